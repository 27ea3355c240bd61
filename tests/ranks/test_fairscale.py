"""fairscale: OSS, which assigns tensors to ranks, and flat parameters as far as they work without a GPU."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from itertools import product
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from fairscale.nn.data_parallel import FullyShardedDataParallel, ShardedDataParallel
from fairscale.optim.oss import OSS
from safetensors.torch import load_file
from torch import Tensor, nn, optim

import twa_scale
from tests import flattened, reference
from tests.grid import rest_slow
from tests.pool import Pool
from tests.ranks import cases
from tests.ranks.cases import Run
from tests.ranks.test_fsdp1 import CONFIG, batches, build, candidates, loss, loss_of
from twa_scale import Snapshots
from twa_scale.base.spans import Span
from twa_scale.engines import choose_engine


def sharded(bucket: int) -> Any:
    """Return the net in ShardedDataParallel, with all parameters in the optimizer."""
    net = build(seed=9)
    return ShardedDataParallel(net, OSS(net.parameters(), optim=optim.SGD, lr=0.1), reduce_buffer_size=bucket)


def train(bucket: int, accumulate: int, no_sync: bool) -> tuple[dict[str, Tensor], Tensor, set[str], list[int]]:
    """Train with evaluations in between, after which fairscale drops its hooks and buckets. Return the weights."""
    rank, size = cases.where()
    model = sharded(bucket)
    twa = twa_scale.attach(model, candidates(), CONFIG)
    for step in range(5):
        parts = batches(step, size)[rank].chunk(accumulate)
        for i, part in enumerate(parts):
            model._should_accumulate_grads = no_sync and i + 1 < len(parts)  # as no_sync() sets it
            (loss(model, part) / accumulate).backward()
            if not no_sync:
                model.eval()
                with torch.no_grad(), twa.weights("last"):
                    loss(model, part)
                model.train()
        twa.step()
        twa.zero_grad()
    owned = {span.name for span in choose_engine(model).spans()}
    elements = [sum(p.numel() for name, p in model.module.named_parameters() if name in owned)]
    return {n: p.detach().clone() for n, p in model.module.named_parameters()}, twa.coefficients, owned, elements


@pytest.mark.parametrize(
    ("size", "bucket", "accumulate", "no_sync"),
    rest_slow(
        [(1, 1 << 23, 2, False), (2, 1 << 23, 2, True), (2, 0, 2, False), (2, 40, 2, False), (3, 40, 2, True)],
        lambda size, bucket, *_: size == 3 or bucket != 40,
    ),
)
def test_sharded_ddp_matches_the_reference(ranks: Pool, size: int, bucket: int, accumulate: int, no_sync: bool) -> None:
    """The cases have all, no and some gradients in buckets. Each tensor belongs to one rank."""
    results = ranks(train, size, bucket=bucket, accumulate=accumulate, no_sync=no_sync)
    steps = [[part for rank in batches(step, size) for part in rank.chunk(accumulate)] for step in range(5)]
    expected = reference.train(build(), loss, candidates(), CONFIG, steps).weights[-1]
    for weights, coefficients, _, _ in results:
        assert torch.equal(coefficients, results[0][1])
        for name, value in expected.items():
            assert (weights[name].double() - value).norm() <= 1e-5 * value.norm(), name
            assert torch.equal(weights[name], results[0][0][name]), name
    assert sorted(name for _, _, owned, _ in results for name in owned) == sorted(expected)
    assert sum(count for *_, (count,) in results) == sum(value.numel() for value in expected.values())


def disturbed(bucket: int) -> tuple[list[str], dict[str, Tensor], dict[str, Tensor]]:
    """Step on gradients that are not reduced, then continue without them."""
    rank, size = cases.where()
    messages, ends = [], []
    for disturb in (False, True):
        model = sharded(bucket)
        twa = twa_scale.attach(model, candidates(), CONFIG)
        for step in range(2):
            if disturb:
                with model.no_sync():
                    loss(model, batches(8, size)[rank]).backward()
                messages.append(cases.error_text(twa.step))
                twa.zero_grad()
            loss(model, batches(step, size)[rank]).backward()
            twa.step()
            twa.zero_grad()
        ends.append({name: p.detach().clone() for name, p in model.module.named_parameters()})
    return messages, ends[0], ends[1]


@pytest.mark.parametrize("bucket", [0, 1 << 23])
def test_unreduced_gradients_are_refused_and_kept(ranks: Pool, bucket: int) -> None:
    for messages, undisturbed, after in ranks(disturbed, 2, bucket=bucket):
        assert all("no_sync" in message for message in messages)
        assert all(torch.equal(after[name], value) for name, value in undisturbed.items())


def fully_sharded(flatten: bool, deep: bool = True) -> Any:
    """Return the net in nested FullyShardedDataParallel. Frozen tensors must not be flattened with others."""
    net: Any = build(seed=9).requires_grad_(True)
    options: dict[str, Any] = {
        "process_group": dist.group.WORLD,  # fairscale would keep groups of its own from one test to the next
        "process_group_reduce_scatter": dist.group.WORLD,
        "compute_device": torch.device("cpu"),
        "flatten_parameters": flatten,
    }
    for i, layer in enumerate(net.layers):
        if deep:  # flat parameters of one element
            layer.factor = FullyShardedDataParallel(layer.factor, **options)
        net.layers[i] = FullyShardedDataParallel(layer, **options)
    return FullyShardedDataParallel(net, **options)


def without_forward(flatten: bool, directory: Path) -> tuple[dict[str, tuple[int, ...]], list[Span], str]:
    """Run everything that needs no GPU: attach, read and write weights, read gradients, step, export, snapshots."""
    model = fully_sharded(flatten)
    twa = twa_scale.attach(model, candidates(), CONFIG)
    engine = choose_engine(model)
    for p in model.parameters():  # as its backward pass sets them, if all gradients were one
        p.grad = torch.ones_like(p)
    twa.step()
    left = [p for p in model.parameters() if p.grad is not None]
    assert not left
    twa.export(directory / "out")
    Snapshots(directory / "run", every_n_steps=1).save(model, 1)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
        p.grad.data = torch.ones(p._orig_size)  # of a backward pass in no_sync()
    messages = cases.error_text(twa.step)
    with twa.weights(1):
        twa.export(directory / "shown")
    return {name: info.shape for name, info in engine.parameters.items()}, engine.spans(), messages


@pytest.mark.parametrize(
    ("size", "flatten"),
    rest_slow(product([1, 2, 3], [True, False]), lambda size, flatten: size == 3 or (size == 1 and flatten)),
)
def test_flat_parameters_are_read_and_written(ranks: Pool, tmp_path: Path, size: int, flatten: bool) -> None:
    results = ranks(without_forward, size, flatten=flatten, directory=tmp_path)
    net: nn.Module = build().requires_grad_(True)
    shapes = {name: tuple(p.shape) for name, p in net.named_parameters()}
    covered = {name: torch.zeros(p.numel(), dtype=torch.int) for name, p in net.named_parameters()}
    for actual, spans, messages in results:
        assert actual == shapes and list(actual) == list(shapes)
        assert size == 1 or "no_sync" in messages
        for span in spans:
            covered[span.name][span.start : span.stop] += 1
    assert all(bool((count == 1).all()) for count in covered.values())

    def all_ones(model: nn.Module, _: object) -> Tensor:
        return torch.stack([value.sum() for name, value in model.named_parameters()]).sum()

    expected = reference.train(net, all_ones, candidates(), CONFIG, [[None]]).weights[-1]
    for path in ("out", "run/step-00000001"):
        stored = load_file(tmp_path / path / "model.safetensors")
        assert stored.keys() - {"head.weight"} == expected.keys()
        for name, value in expected.items():
            assert (stored[name].double() - value).norm() <= 1e-5 * value.norm(), name
    displayed = load_file(tmp_path / "shown/model.safetensors")
    for name, value in candidates()[1].items():
        torch.testing.assert_close(displayed[name], value, rtol=1e-5, atol=1e-6)


class NoStream:
    """A stand-in for a CUDA stream on a machine without a GPU."""

    def __eq__(self, other: object) -> bool:
        return True

    def wait_stream(self, other: object) -> None:
        pass


@contextmanager
def streams_that_do_nothing() -> Iterator[None]:
    """Replace CUDA streams, so that the training of fairscale runs on the CPU with gloo."""

    def reduce_scatter(out: Tensor, parts: Tensor, group: dist.ProcessGroup) -> None:
        dist.reduce_scatter_tensor(out, parts.flatten(), group=group)

    with (
        mock.patch.multiple(
            torch.cuda,
            is_available=lambda: True,
            Stream=NoStream,
            current_stream=NoStream,
            stream=lambda _: nullcontext(),
            synchronize=lambda: None,
        ),
        mock.patch.object(Tensor, "record_stream", lambda *_: None),
        mock.patch.object(dist, "_reduce_scatter_base", reduce_scatter),
    ):
        yield


def with_forward(flatten: bool, accumulate: int) -> tuple[dict[str, Tensor], Tensor, float, float]:
    """Train. Return the weights, the coefficients, and the losses of candidate 1 and of the restored weights."""
    rank, size = cases.where()
    with streams_that_do_nothing():
        # fairscale treats a gradient of one element as one of no_sync(): when accumulated, it is divided twice.
        model = fully_sharded(flatten, deep=accumulate == 1)
        twa = twa_scale.attach(model, candidates(), CONFIG)
        for step in range(5):
            for part in batches(step, size)[rank].chunk(accumulate):
                (loss(model, part) / accumulate).backward()
            twa.step()
            twa.zero_grad()
        with torch.no_grad():
            loss(model, batches(0, 1)[0])  # keeps the weights of the root gathered
            with twa.weights(1):
                displayed = float(loss(model, batches(0, 1)[0]))
            shown_loss = float(loss(model, batches(0, 1)[0]))
        return (
            {name: value.clone() for name, value in model.state_dict().items()},
            twa.coefficients,
            displayed,
            shown_loss,
        )


@pytest.mark.parametrize(
    ("size", "flatten", "accumulate"),
    rest_slow([(1, True, 1), (2, True, 2), (2, False, 1), (3, True, 1)], lambda size, *_: size == 2),
)
def test_flat_parameters_match_the_reference(ranks: Pool, size: int, flatten: bool, accumulate: int) -> None:
    results = ranks(with_forward, size, flatten=flatten, accumulate=accumulate)
    steps = [[part for rank in batches(step, size) for part in rank.chunk(accumulate)] for step in range(5)]
    net: nn.Module = build().requires_grad_(True)
    expected = reference.train(net, loss, candidates(), CONFIG, steps).weights[-1]
    for weights, coefficients, displayed, shown_loss in results:
        assert torch.equal(coefficients, results[0][1])
        for name, value in expected.items():
            assert (weights[name].double() - value).norm() <= 1e-5 * value.norm(), name
        assert displayed == pytest.approx(loss_of(candidates()[1]), rel=1e-5)
        assert shown_loss == pytest.approx(loss_of(expected), rel=1e-5)


def offloaded() -> None:
    twa_scale.attach(
        FullyShardedDataParallel(
            build().requires_grad_(True),
            process_group=dist.group.WORLD,
            process_group_reduce_scatter=dist.group.WORLD,
            compute_device=torch.device("cpu"),
            move_params_to_cpu=True,
        ),
        candidates(),
    )


def test_offloading_is_refused(ranks: Pool) -> None:
    assert "move_params_to_cpu" in str(ranks.error(offloaded, 2))


def elements_sent(engine: str) -> tuple[int, int]:
    """Return the number of elements that a step broadcasts, and the number of trained elements."""
    model, twa = cases.attach(engine, Run({}))
    group = twa._engine.shard_group
    with mock.patch.object(group, "copy_from", wraps=group.copy_from) as broadcast:
        cases.one_step(model, twa, 0)
    named = model.get_submodule("module").named_parameters()
    trained = [p for name, p in named if p.requires_grad and name != flattened.OUTSIDE]
    return sum(call.args[1].numel() for call in broadcast.call_args_list), sum(p.numel() for p in trained)


def test_weights_are_broadcast_once_per_step(ranks: Pool) -> None:
    for sent, trained in ranks(elements_sent, 2, engine="sharded-ddp"):
        assert sent == trained
