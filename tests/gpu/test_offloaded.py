"""Stores in host memory for a model on a GPU: the same results, little GPU memory, and copies that overlap."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F

import twa_scale
from tests.deltas import fill
from tests.gpu.test_cuda import build, candidates, exact, nccl, shard
from twa_scale.base.spans import Span
from twa_scale.config import TwaConfig
from twa_scale.engines.deferred_weights import Combine
from twa_scale.kernels import choose_kernels
from twa_scale.store.make import host_store, make_store
from twa_scale.store.offloaded import BUFFER, OffloadedStore

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]
NAMES = ["dense32", "dense16", "packed8", "packed4", "packed2", "packed1"]
N = 4
__all__ = ["exact", "nccl"]  # fixtures


def offloaded(config: TwaConfig, n: int, buffer: int = BUFFER) -> OffloadedStore:
    device = torch.device("cuda")
    kernels = choose_kernels(config.kernels, device)
    return OffloadedStore(lambda allocate: host_store(config, n, allocate), device, kernels, buffer)


def filled(config: TwaConfig, spans: list[Span], buffer: int, n: int = N) -> tuple[OffloadedStore, list[Any]]:
    """Return the store, and the rows and the center of each span on the GPU, with codes computed on the CPU."""
    store, resident = offloaded(config, n, buffer), []
    inner = host_store(config, n, torch.zeros)
    generator = torch.Generator().manual_seed(1)
    for span in spans:
        values = torch.randn(n, len(span), generator=generator)
        for each in (store, inner):
            fill(each, span, values)
        rows, center = inner.rows_and_center(span)
        resident.append((rows.over([t.cuda() for t in rows.tensors]), center.cuda()))
    return store, resident


def busy(milliseconds: float) -> None:
    torch.cuda._sleep(int(milliseconds * 1e6))  # number of cycles; there are one to two thousand in a microsecond


def seconds(work: Callable[[], object], times: int = 5) -> float:
    """Return the best time by events, without synchronizing the host."""
    actual: list[float] = []
    for _ in range(times + 1):  # the first call compiles
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        first.record()
        work()
        last.record()
        last.synchronize()
        actual.append(first.elapsed_time(last) / 1e3)
    return min(actual[1:])


@pytest.mark.parametrize("kernels", ["torch", "triton"])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("late", [False, True])
def test_stores_in_host_memory_equal_those_on_the_gpu(name: Any, kernels: Any, late: bool) -> None:
    """The GPU may be far behind the host and use several streams. No buffer is filled before it was read."""
    spans = [Span(str(i), i, i + m) for i, m in enumerate((3, 600_000, 0, 900, 1_000_003))]
    store, resident = filled(TwaConfig(store=name, kernels=kernels), spans, 1 << 19)
    compute = choose_kernels(kernels, torch.device("cuda"))
    generator = torch.Generator(device="cuda").manual_seed(2)
    streams = [torch.cuda.current_stream(), torch.cuda.Stream()]
    actual = []
    for turn in range(2 * len(spans)):
        span = spans[turn % len(spans)]
        gradient = torch.randn(len(span), generator=generator, device="cuda")
        weights = torch.randn(N, generator=generator, device="cuda")
        out = torch.empty(len(span), device="cuda")
        stream = streams[turn // len(spans)]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            if late:
                busy(20)
            products = store.project(span, gradient, True)
            store.combine(span, weights, 0.7, out)
        actual.append((*resident[turn % len(spans)], gradient, weights, products, out))
    torch.cuda.synchronize()
    for rows, center, gradient, weights, products, out in actual:
        assert products.is_cuda and products.dtype == torch.float64
        torch.testing.assert_close(products[:-1], compute.project(rows, gradient), rtol=1e-6, atol=1e-4)
        torch.testing.assert_close(products[-1], center.double() @ gradient.double(), rtol=1e-4, atol=1e-2)
        expected = torch.empty_like(out)
        compute.combine(rows, weights, center, 0.7, expected)
        torch.testing.assert_close(out, expected, rtol=0, atol=0)
    store.close()


@pytest.mark.parametrize("operation", ["project", "combine"])
def test_host_does_not_wait(operation: str) -> None:
    span = Span("w", 0, 4_000_000)
    store, _ = filled(TwaConfig(store="packed4"), [span], 1 << 20)
    gradient, weights, out = (torch.randn(m, device="cuda") for m in (len(span), N, len(span)))

    def work() -> None:
        if operation == "project":
            store.project(span, gradient, False)
        else:
            store.combine(span, weights, 1.0, out)

    work()
    torch.cuda.synchronize()
    busy(500)
    work()
    assert not torch.cuda.current_stream().query(), "the host came back only when the GPU was done"
    torch.cuda.synchronize()
    store.close()


@pytest.mark.parametrize("name", ["dense32", "packed4"])
@pytest.mark.parametrize("sharded", [False, True])
def test_training_with_an_offloaded_store_equals_training_on_the_gpu(nccl: None, name: str, sharded: bool) -> None:
    def train(store_device: str) -> tuple[dict[str, Tensor], Tensor]:
        model = shard(build().cuda()) if sharded else build().cuda()
        config = {"groups": "tensor", "basis": "orthonormal", "store": name, "store_device": store_device}
        twa = twa_scale.attach(model, candidates=candidates(build()), config=config | {"optimizer": {"lr": 0.1}})
        generator = torch.Generator().manual_seed(2)
        for _ in range(5):
            x, y = torch.randn(16, 32, generator=generator), torch.randn(16, 1, generator=generator)
            F.mse_loss(model(x.cuda()), y.cuda()).backward()
            twa.step()
            twa.zero_grad()
        weights = {span.name: twa._engine.live(span).detach().cpu().clone() for span in twa._engine.spans()}
        twa.close()
        return weights, twa.coefficients.cpu()

    (first, a), (second, b) = train("auto"), train("cpu")
    tolerance = 1e-4 if name == "dense32" else 1e-2  # the GPU and the CPU round some codes differently
    torch.testing.assert_close(b, a, rtol=tolerance, atol=tolerance)
    for key, value in first.items():
        torch.testing.assert_close(second[key], value, rtol=tolerance, atol=tolerance)


def test_the_gpu_holds_only_buffers() -> None:
    """The store of 8 x 67 M weights has 2.4 GB. The GPU also holds one gradient and the memory of forward passes."""
    model = nn.Linear(8192, 8192, bias=False).cuda()
    first = {name: value.detach().cpu() for name, value in model.state_dict().items()}
    states = [{"weight": first["weight"] + i} for i in range(8)]
    x = torch.randn(4, 8192, device="cuda")
    model(x).square().mean().backward()  # cuBLAS takes its workspace once, from the same allocator
    model.zero_grad()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    twa = twa_scale.attach(model, states, {"store": "dense32", "store_device": "cpu"})
    attached = torch.cuda.max_memory_allocated() - before
    assert twa.store_bytes == 4 * 9 * 8192 * 8192
    assert attached <= 2 * BUFFER + (32 << 20)
    model(x).square().mean().backward()
    twa.step()
    peak = torch.cuda.max_memory_allocated() - before
    gradient = 4 * 8192 * 8192
    print(f"store {twa.store_bytes / 1e9:.2f} GB; on the GPU: attach {attached / 1e6:.0f} MB, peak {peak / 1e6:.0f} MB")
    assert peak <= 2 * BUFFER + 2 * gradient + (64 << 20)
    twa.close()
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() - before <= 1 << 20


@pytest.mark.parametrize("name", ["dense16", "packed4"])
def test_copies_have_the_speed_of_the_bus_and_overlap(name: Any) -> None:
    """`project` and `combine` take the time of the copies. On a stream of its own the time of `project` is hidden by
    backward.

    Timings of one process on an idle GPU; `pytest -s` shows them.
    """
    n, config = 16, TwaConfig(store=name)
    spans = [Span(str(i), 0, 16 << 20) for i in range(4)]
    store, resident = offloaded(config, n), make_store(config, n, torch.device("cuda"), lambda _: [])
    for span in spans:
        values = torch.randn(n, len(span))
        for each in (store, resident):
            fill(each, span, values)
    gradient, weights, out = (torch.randn(m, device="cuda") for m in (len(spans[0]), n, len(spans[0])))
    pinned = torch.empty(256 << 20, dtype=torch.uint8).pin_memory()
    target = torch.empty_like(pinned, device="cuda")
    rate = pinned.nbytes / seconds(lambda: target.copy_(pinned, non_blocking=True))
    matrix = torch.randn(4096, 4096, device="cuda")

    def project(of: Any) -> None:
        for span in spans:
            of.project(span, gradient, False)

    def combine(of: Any) -> None:
        for span in spans:
            of.combine(span, weights, 1.0, out)

    bus = {"project": store.nbytes - 4 * sum(map(len, spans)), "combine": store.nbytes}
    print(f"\n{name}: copies at {rate / 1e9:.1f} GB/s")
    taken = {}
    for operation in (project, combine):
        part = operation.__name__
        taken[part], window = seconds(lambda: operation(store)), seconds(lambda: operation(resident))  # noqa: B023
        least = bus[part] / rate
        print(
            f"{part}: {1e3 * taken[part]:.2f} ms; the copy alone {1e3 * least:.2f}; beside weights {1e3 * window:.2f}"
        )
        assert taken[part] <= 1.25 * least + window

    side, steps = torch.cuda.Stream(), 1
    while (single := seconds(lambda: [matrix @ matrix for _ in range(steps)])) < 2 * taken["project"]:  # noqa: B023
        steps *= 2

    def both() -> None:
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            project(store)
        for _ in range(steps):
            matrix @ matrix
        torch.cuda.current_stream().wait_stream(side)

    combined = seconds(both)
    print(f"products of matrices {1e3 * single:.2f} ms; with project beside them {1e3 * combined:.2f}")
    assert combined <= single + 0.5 * taken["project"]
    for each in (store, resident):
        each.close()


def blocks() -> nn.Module:
    """Return eight units whose forward pass takes about as long as the copy of their store."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Sequential(nn.Linear(2048, 2048), nn.Tanh()) for _ in range(8))).cuda()
    mesh = init_device_mesh("cuda", (1,))
    for block in model:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


@pytest.mark.parametrize("store_device", ["cpu", "auto"])
def test_combining_during_the_forward_pass_changes_no_bit(nccl: None, store_device: str) -> None:
    """Losses and weights are the same if the GPU is late. `pytest -s` prints the time of a step on an idle GPU."""
    generator = torch.Generator().manual_seed(1)
    bases = [(0.02 * torch.randn(2048, 2048, generator=generator), torch.zeros(2048)) for _ in range(8)]
    states = [
        {f"{i}.0.{kind}": v + 0.001 * torch.randn(v.shape, generator=generator) for i, base in enumerate(bases)
         for kind, v in zip(("weight", "bias"), base, strict=True)}
        for _ in range(8)
    ]  # fmt: skip
    x = torch.randn(16384, 2048, generator=generator).cuda()

    def train(combine: str) -> tuple[list[Tensor], dict[str, Tensor], float]:
        model, losses = blocks(), []
        config = {"store": "dense16", "store_device": store_device, "combine": combine, "groups": "tensor"}
        twa = twa_scale.attach(model, states, config)

        def steps(late: float = 0) -> None:
            for _ in range(5):
                loss = model(x).square().mean()
                loss.backward()
                losses.append(loss.detach())
                busy(late)
                twa.step()
                twa.zero_grad()
                busy(late)
            twa.write_deferred()

        steps(late=20)
        with torch.no_grad(), twa.weights("last"):
            losses.append(model(x).square().mean())
        took = seconds(steps, times=3) / 5
        steps(late=20)
        weights = {name: value.to_local().cpu() for name, value in model.state_dict().items()}
        twa.close()
        return losses, weights, took

    actual, expected = train("forward"), train("step")
    print(
        f"\nstore_device {store_device}: a step takes {1e3 * expected[2]:.2f} ms, with `forward` {1e3 * actual[2]:.2f}"
    )
    assert all(torch.equal(first, second) for first, second in zip(actual[0], expected[0], strict=True))
    assert all(torch.equal(actual[1][name], value) for name, value in expected[1].items())


def test_host_does_not_wait_for_units(nccl: None) -> None:
    model = blocks()
    states = [{name: torch.full(p.shape, float(i)) for name, p in model.named_parameters()} for i in range(4)]
    twa = twa_scale.attach(model, states, {"store": "dense16", "store_device": "cpu", "combine": "forward"})
    x = torch.zeros(1, 2048, device="cuda")
    for _ in range(2):
        model(x).sum().backward()
        twa.step()

    def late() -> Combine:
        combine = twa._weights._combiner(twa._written.current)
        busy(500)  # on the stream that combines
        return combine

    torch.cuda.synchronize()
    twa._weights._deferred.start(late)
    model(x)
    assert not torch.cuda.current_stream().query(), "the forward pass has not waited, or the host has"
    twa.close()
