"""Asynchronous snapshots have the weights of their step, are written one at a time, and are published atomically."""

import contextlib
import logging
import os
import resource
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import nn

from tests import models
from tests.forked_modules import run_module
from tests.grid import rest_slow
from tests.pool import Pool
from tests.ranks.cases import gathered
from twa_scale.candidates import open_candidates
from twa_scale.errors import OutputError
from twa_scale.output.ranks_writer import Writer
from twa_scale.output.snapshots import Snapshots
from twa_scale.ranks import Group

Tensors = dict[str, torch.Tensor]


@contextmanager
def block_writes() -> Iterator[threading.Event]:
    """Block every write of this process until the event is set."""
    event = threading.Event()
    write = Writer.write

    def held(self: Writer, *args: Any, **options: Any) -> None:
        assert event.wait(60)
        write(self, *args, **options)

    with mock.patch.object(Writer, "write", held):
        yield event
        event.set()


def remaining_files(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def visible(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir() if not path.name.startswith("."))


def train(model: nn.Module, steps: int) -> None:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    group = Group.world()
    for step in range(steps):
        models.loss(model, models.part(models.batch(step), group.rank, group.size)).backward()
        optimizer.step()
        optimizer.zero_grad()


def train_meanwhile(directory: Path, engine: str) -> tuple[Tensors, Tensors]:
    """Return the weights of the step and those at the end."""
    model = models.wrap(models.build(0, (1,)), engine)
    train(model, 1)
    own = gathered(model)
    with block_writes() as event, Snapshots(directory, every_n_steps=1, asynchronous=True) as snapshots:
        snapshots.step(model, 1)
        train(model, 3)
        assert visible(directory) == []
        dist.barrier()  # plain models are not synchronized: the first rank must not publish before all have checked
        event.set()
    assert visible(directory) == ["step-00000001"]
    return own, gathered(model)


def meaning_of_signals(directory: Path) -> list[bool]:
    """Return whether SIGTERM has its default handler before, during and after a write."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    model = models.build(0, (1,))

    def default() -> bool:
        return signal.getsignal(signal.SIGTERM) is signal.SIG_DFL

    actual = [default()]
    with block_writes() as event, Snapshots(directory, every_n_steps=1, asynchronous=True) as snapshots:
        snapshots.step(model, 1)
        actual.append(default())
        event.set()
    actual.append(default())
    with (
        mock.patch.object(Writer, "write", lambda *_, **__: actual.append(default())),
        contextlib.suppress(AssertionError),
    ):
        Snapshots(directory, every_n_steps=1).save(model, 2)
    return actual[:4]


def test_signals_are_handled_in_writes_of_the_main_thread_only(ranks: Pool, tmp_path: Path) -> None:
    assert ranks(meaning_of_signals, 1, directory=tmp_path) == [[True, True, True, False]]


@pytest.mark.parametrize(
    ("size", "engine"),
    rest_slow(product([1, 2, 3], ["plain", "ddp", "fsdp2"]), lambda size, engine: size == 3 or engine == "plain"),
)
def test_snapshot_holds_the_weights_of_its_step(ranks: Pool, tmp_path: Path, engine: str, size: int) -> None:
    own, later = ranks(train_meanwhile, size, directory=tmp_path, engine=engine)[0]
    (candidate,) = open_candidates(str(tmp_path / "step-*"), minimum=1)
    assert os.listdir(tmp_path) == ["step-00000001"]  # noqa: PTH208
    assert remaining_files(tmp_path / "step-00000001") == ["model.safetensors", "twa_scale.json"]
    actual = load_file(tmp_path / "step-00000001/model.safetensors")
    assert {*own} <= {*actual} == {*candidate.names()}
    for name, value in own.items():
        assert torch.equal(actual[name], value), name
    assert not torch.equal(actual["blocks.0.qkv.weight"], later["blocks.0.qkv.weight"])
    assert actual["stem.norm.num_batches_tracked"] == 1


def take_many(directory: Path, dtype: torch.dtype | None) -> list[str]:
    model = models.wrap(models.build(0, (1,)), "fsdp2")
    options: dict[str, Any] = {"keep_last": 2, "dtype": dtype, "max_shard_size": 900, "files": {"config.json": b"{}"}}
    snapshots = Snapshots(directory, every_n_steps=2, asynchronous=True, **options)
    records: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("twa_scale.output.snapshots")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    with block_writes() as event:
        for step in range(1, 7):
            if step == 4:  # step 2 is still blocked when the signal arrives
                threading.Timer(0.3, event.set).start()
            snapshots.step(model, step)
            if step == 4:
                assert "step-00000002" in visible(directory)
        snapshots.wait()
        snapshots.wait()
    snapshots.close()
    logger.removeHandler(handler)
    return records


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_one_snapshot_is_written_at_a_time(ranks: Pool, tmp_path: Path, dtype: torch.dtype | None) -> None:
    records = ranks(take_many, 2, directory=tmp_path, dtype=dtype)
    assert all(any("step 4 waits" in message for message in messages) for messages in records)
    assert sorted(os.listdir(tmp_path)) == ["step-00000004", "step-00000006"]  # noqa: PTH208
    assert (tmp_path / "step-00000006/config.json").read_bytes() == b"{}"
    for candidate in open_candidates(str(tmp_path / "step-*")):
        for name, value in models.build(0, (1,)).state_dict().items():
            if name != "head.weight":
                wanted = value.to(dtype) if dtype and value.is_floating_point() else value
                out = torch.empty(value.numel(), dtype=wanted.dtype)
                candidate.read(name, 0, out)
                assert torch.equal(out, wanted.reshape(-1)), name


def fail_on_one_rank(directory: Path, failing: int, mode: str) -> None:
    """One rank reaches a limit on file sizes. The next call raises the error, and a later one succeeds."""
    model = models.wrap(models.build(0, (1,)), "fsdp2")
    snapshots = Snapshots(directory, every_n_steps=1, asynchronous=True)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    with block_writes() as event:
        snapshots.step(model, 1)
        if dist.get_rank() == failing:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
        event.set()
        try:
            if mode == "wait":
                snapshots.wait()
            else:
                snapshots.step(model, 2)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
            dist.barrier()
            assert os.listdir(directory) == []  # noqa: PTH208
            dist.barrier()
            snapshots.step(model, 3)
            snapshots.close()
            assert visible(directory) == ["step-00000003"]


@pytest.mark.parametrize(("size", "failing"), [(1, 0), (2, 0), (2, 1), (3, 1)])
@pytest.mark.parametrize("mode", ["wait", "step"])
def test_error_of_one_rank_is_raised_on_all(ranks: Pool, tmp_path: Path, size: int, failing: int, mode: str) -> None:
    error = ranks.error(fail_on_one_rank, size, directory=tmp_path, failing=failing, mode=mode)
    assert isinstance(error, OutputError)
    assert "step-00000001: could not be written: File too large" in str(error) and "ulimit -f" in str(error)


def leave_by_an_error(directory: Path) -> list[str]:
    model = models.wrap(models.build(0, (1,)), "fsdp2")
    with block_writes() as event:
        with pytest.raises(ZeroDivisionError), Snapshots(directory, every_n_steps=1, asynchronous=True) as snapshots:
            snapshots.step(model, 1)
            raise ZeroDivisionError  # on all ranks in this test, but a rank cannot know that
        stored = visible(directory)
        event.set()
    snapshots.wait()
    return stored


def test_exit_after_an_error_does_not_wait(ranks: Pool, tmp_path: Path) -> None:
    assert ranks(leave_by_an_error, 2, directory=tmp_path) == [[], []]
    assert visible(tmp_path) == ["step-00000001"]


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, list[int]]]:
    """Return directory and exit codes of programs that ended while they wrote; see `tests/end_while_writing.py`."""
    directory = tmp_path_factory.mktemp("ended")
    done = run_module("tests.end_while_writing", directory, timeout=120)
    assert done.returncode == 0, done.stderr
    return {
        name: (directory / name, [int(code) for code in codes.split(",")])
        for name, codes in (line.split(":") for line in done.stdout.split())
    }


def test_program_that_ends_early_leaves_a_complete_candidate(ended: dict[str, tuple[Path, list[int]]]) -> None:
    directory, codes = ended["leave"]
    assert codes == [0, 0] and os.listdir(directory) == ["step-00000001"]  # noqa: PTH208
    actual = load_file(directory / "step-00000001/model.safetensors")
    assert torch.equal(actual["embed.weight"], models.build(0, (1,)).embed.weight)


@pytest.mark.parametrize("killed", [0, 1])
def test_crash_leaves_no_candidate(ended: dict[str, tuple[Path, list[int]]], killed: int) -> None:
    directory, codes = ended[f"kill-{killed}"]
    assert codes[killed] == -signal.SIGKILL and codes[1 - killed] == 0
    assert visible(directory) == []
