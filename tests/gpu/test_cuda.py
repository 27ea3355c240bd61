"""Results on a GPU equal those on a CPU: kernels, plain and FSDP2 training, and the memory of `attach`."""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

import twa_scale
from tests.deltas import packed
from twa_scale.candidates.streaming import scratch_bytes
from twa_scale.kernels import Dense, choose_kernels
from twa_scale.kernels.torch.reference import GPU_BLOCK

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]
N = 4


@pytest.fixture
def nccl(tmp_path: Path) -> Iterator[None]:
    """Create a process group with one rank."""
    torch.cuda.set_device(0)
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("cpu:gloo,cuda:nccl", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def build(width: int = 64) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(32, width), nn.Tanh(), nn.Sequential(nn.Linear(width, width), nn.Tanh()), nn.Linear(width, 1)
    )


def candidates(model: nn.Module) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    base = model.state_dict()
    return [
        {name: value + 0.05 * torch.randn(value.shape, generator=generator) for name, value in base.items()}
        for _ in range(N)
    ]


def shard(model: nn.Sequential, policy: MixedPrecisionPolicy | None = None) -> nn.Module:
    mesh = init_device_mesh("cuda", (1,))
    policy = policy or MixedPrecisionPolicy()
    fully_shard(model[2], mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    return model


def train(model: nn.Module, device: str, dtype: torch.dtype = torch.float32) -> tuple[dict[str, Tensor], Tensor]:
    """Attach and take 5 steps; return the weights and coefficients, on the CPU."""
    config = {"groups": "tensor", "optimizer": {"name": "adamw", "lr": 0.1}}
    twa = twa_scale.attach(model, candidates=candidates(build()), config=config)
    generator = torch.Generator().manual_seed(2)
    for _ in range(5):
        x, y = torch.randn(16, 32, generator=generator), torch.randn(16, 1, generator=generator)
        F.mse_loss(model(x.to(device, dtype)).float(), y.to(device)).backward()
        twa.step()
        twa.zero_grad()
    weights = {
        name: (value.full_tensor() if isinstance(value, DTensor) else value).detach().cpu()
        for name, value in model.state_dict().items()
    }
    coefficients = twa.coefficients.cpu()
    twa.close()
    return weights, coefficients


def check(found: tuple[dict[str, Tensor], Tensor], tolerance: float) -> None:
    weights, coefficients = train(build(), "cpu")
    torch.testing.assert_close(found[1], coefficients, rtol=tolerance, atol=tolerance)
    for name, value in weights.items():
        error = float((found[0][name].double() - value.double()).norm() / value.double().norm())
        assert error <= tolerance, (name, error)


@pytest.fixture(autouse=True)
def exact() -> Iterator[None]:
    """Disable TF32, which rounds the matrix products of the model to 10 bits."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


def test_plain() -> None:
    check(train(build().cuda(), "cuda"), 1e-4)


def test_fsdp2(nccl: None) -> None:
    check(train(shard(build().cuda()), "cuda"), 1e-4)


def test_fsdp2_in_bfloat16(nccl: None) -> None:
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    check(train(shard(build().cuda(), policy), "cuda", torch.bfloat16), 3e-2)


def test_exported_files(nccl: None, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    model = shard(build().cuda())
    twa = twa_scale.attach(model, candidates=candidates(build()))
    twa.export(tmp_path / "out")
    for name, value in load_file(tmp_path / "out/model.safetensors").items():
        live = model.state_dict()[name]
        assert isinstance(live, DTensor) and torch.equal(value, live.full_tensor().cpu())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("m", [0, 1, 1000, (1 << 24) + 3])
@pytest.mark.parametrize("name", ["torch", "triton"])
def test_kernels(name: Literal["torch", "triton"], dtype: torch.dtype, m: int) -> None:
    """The rows cross the boundary of a block of the GPU."""
    generator = torch.Generator(device="cuda").manual_seed(3)
    kernels = choose_kernels(name, torch.device("cuda"))
    assert kernels.name == name
    rows = torch.randn(N, m, generator=generator, device="cuda").to(dtype)
    dense = Dense.empty(N, m, dtype, rows.device)
    dense.write(0, rows)
    gradient = torch.randn(m, generator=generator, device="cuda")
    expected = rows.double() @ gradient.double()
    actual = kernels.project(dense, gradient)
    assert actual.is_cuda and actual.dtype == torch.float64
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5 * max(m, 1) ** 0.5)

    weights = torch.randn(N, generator=generator, device="cuda", dtype=torch.float64)
    base = torch.randn(m, generator=generator, device="cuda")
    exact = 0.7 * base.double() + weights @ rows.double()
    for out_type, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 1e-2)):
        out = torch.empty(m, dtype=out_type, device="cuda")
        kernels.combine(dense, weights, base, 0.7, out)
        torch.testing.assert_close(out.double(), exact, rtol=tolerance, atol=tolerance)


def test_attach_memory_is_the_store_and_a_bounded_rest() -> None:
    """The candidates of 4 x 17 M weights are on the CPU, and the deltas on the GPU."""
    model = nn.Linear(4096, 4096, bias=False).cuda()
    first = {name: value.detach().cpu() for name, value in model.state_dict().items()}
    states = [copy.deepcopy(first) for _ in range(N)]
    for i, state in enumerate(states):
        state["weight"] += i
    torch.mv(
        model.weight.detach(), model.weight.detach()[0]
    )  # cuBLAS allocates its workspace once from the same allocator
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    twa = twa_scale.attach(model, candidates=states)
    stored, peak = torch.cuda.memory_allocated() - before, torch.cuda.max_memory_allocated() - before
    assert twa.store_bytes == 4 * (N + 1) * 4096 * 4096
    assert twa.store_bytes <= stored <= 1.02 * twa.store_bytes + (1 << 20)
    # The rows of a chunk, the double copy of a part of them for the Gram matrix, and one block of `combine`.
    assert peak <= stored + 2 * scratch_bytes(N, 4096 * 4096) + 3 * GPU_BLOCK
    torch.testing.assert_close(model.weight.detach().cpu(), first["weight"] + (N - 1) / 2)
    twa.close()


@pytest.mark.parametrize("name", ["torch", "triton"])
@pytest.mark.parametrize("bits", [8, 4, 2, 1])
@pytest.mark.parametrize("m", [1, 1000, 2_000_003])
def test_packed_kernels(name: Literal["torch", "triton"], bits: int, m: int) -> None:
    """Results on the GPU equal those on the CPU up to the order of sums."""
    generator = torch.Generator().manual_seed(3)
    values, gradient = torch.randn(N, m, generator=generator), torch.randn(m, generator=generator)
    weights, base = torch.randn(N, generator=generator), torch.randn(m, generator=generator)
    ended: list[tuple[Tensor, Tensor, Tensor]] = []
    for kernels in (choose_kernels("torch", torch.device("cpu")), choose_kernels(name, torch.device("cuda"))):
        device = torch.device("cpu" if kernels.name == "torch" and not ended else "cuda")
        rows, out = packed(values, bits, kernels, 37, device), torch.empty(m, device=device)
        kernels.combine(rows, weights.to(device), base.to(device), 0.7, out)
        ended.append((rows.words.cpu(), kernels.project(rows, gradient.to(device)).cpu(), out.cpu()))
    (words, product, out), (other_words, other_product, other_out) = ended
    assert (words != other_words).float().mean() <= 1e-3
    torch.testing.assert_close(other_product, product, rtol=1e-3, atol=1e-2 * m**0.5)
    assert float((other_out - out).norm()) <= 1e-3 * float(out.norm())
