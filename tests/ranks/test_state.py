"""A run continues from its state with the same trajectory, on any ranks and any engine, with the same candidates."""

import io
import os
import shutil
import sys
from collections.abc import Callable
from functools import cache
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import twa_scale
from tests import models
from tests.grid import rest_slow
from tests.pool import Pool
from tests.ranks import cases
from tests.ranks.cases import Run
from tests.ranks.test_reading import save
from twa_scale import StateError
from twa_scale.average.rows import stored
from twa_scale.integrations.coefficients import load_coefficients, save_coefficients
from twa_scale.output.disk import OpenFile

CONFIGS: dict[str, dict[str, Any]] = {
    "normalized": {"groups": "block"},
    "orthonormal": {"basis": "orthonormal", "groups": "tensor", "units": "weight", "optimizer": {"lr": 0.003}},
    "pca": {"basis": "pca", "optimizer": {"name": "sgd", "lr": 0.003, "momentum": 0.9}},
    "simplex": {"basis": "simplex", "groups": "tensor", "start": "center"},
    "rows": {"groups": "tensor+row", "optimizer": {"name": "sgd", "lr": 0.003, "row_lr": 0.01, "momentum": 0.9}},
}
NUM_STEPS = 6


def continue_run(
    engine: str,
    config: dict[str, Any],
    first: int,
    last: int,
    state: bytes | None,
    paths: Any = None,
    directory: Path | None = None,
    in_file: bytes | None = None,
) -> Any:
    """Take steps first..last-1, from `state` if given. Return the weights and the state.

    With a directory, the state with the rows in a file there is returned, too, and both are the same.

    BatchNorm is in evaluation mode, so that a step does not depend on how its batch is split over the ranks.
    """
    shape = (1,) if paths is None else models.SCALAR_SHAPE  # DeepSpeed has no parameters of shape ()
    model, twa = cases.attach(engine, Run(config, scalar_shape=shape), paths)
    next(module for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d)).eval()
    if state is not None:
        twa.load_state_dict(torch.load(io.BytesIO(state), weights_only=True))
    if in_file is not None:
        before = saved(twa.state_dict()["rows"])
        twa.load_state_dict(torch.load(io.BytesIO(in_file), weights_only=True), directory)
        assert saved(twa.state_dict()["rows"]) == before, "rows from the file are others"
    for step in range(first, last):
        cases.one_step(model, twa, step)
    beside = None if directory is None else saved(twa.state_dict(directory))
    return cases.gathered(model), twa.coefficients, saved(twa.state_dict()), beside


def saved(state: Any) -> bytes:
    file = io.BytesIO()
    torch.save(state, file)
    return file.getvalue()


def run_parts(
    ranks: Pool, config: dict[str, Any], parts: list[tuple[str, int, int]], directory: Path | None = None
) -> list[Any]:
    """Run parts (engine, number of ranks, steps), each from the state of rank 0 after the previous part."""
    state, in_file, done = None, None, 0
    for engine, size, steps in parts:
        states: dict[str, Any] = {"state": state, "in_file": in_file, "directory": directory}
        results = ranks(continue_run, size, engine=engine, config=config, first=done, last=done + steps, **states)
        (_, _, state, in_file), done = results[0], done + steps
    assert done == NUM_STEPS
    return results


@pytest.fixture(scope="module")
def uninterrupted(ranks: Pool) -> Callable[[str, int, str], list[Any]]:
    """Return the results of all steps in one run of an engine, number of ranks and config; run once."""
    return cache(lambda engine, size, name: run_parts(ranks, CONFIGS[name], [(engine, size, NUM_STEPS)]))


SAME = [(engine, size, name) for engine, size in (("plain", 1), ("ddp", 2), ("fsdp2", 2)) for name in CONFIGS]


@pytest.mark.parametrize(
    ("engine", "size", "name"),
    rest_slow(SAME, lambda engine, _, name: engine == "plain" or (engine == "fsdp2" and name == "rows")),
)
def test_the_same_ranks_continue_bit_for_bit(
    ranks: Pool, uninterrupted: Callable[..., Any], tmp_path: Path, engine: str, size: int, name: str
) -> None:
    directory = tmp_path if name == "rows" else None
    resumed = run_parts(ranks, CONFIGS[name], [(engine, size, 3), (engine, size, NUM_STEPS - 3)], directory)
    for (weights, a, state, _), (expected, want_a, *_) in zip(resumed, uninterrupted(engine, size, name), strict=True):
        assert torch.equal(a, want_a)
        assert all(torch.equal(weights[tensor], value) for tensor, value in expected.items())
        assert len(state) < 64_000, "the state of a run is kilobytes"


PARTS = {
    "fsdp2-2-3-1": [("fsdp2", 2, 2), ("fsdp2", 3, 2), ("fsdp2", 1, 2)],
    "fsdp2-ddp-plain": [("fsdp2", 3, 2), ("ddp", 2, 2), ("plain", 1, 2)],
    "plain-plain-ddp": [("plain", 1, 2), ("plain", 3, 2), ("ddp", 1, 2)],
    "fsdp1-sharded-ddp-flat": [("fsdp1", 3, 2), ("sharded-ddp", 2, 2), ("fsdp1-flat", 2, 2)],
    "tp-hsdp-tp": [("fsdp2-tp", 4, 2), ("hsdp", 4, 2), ("tp", 2, 2)],
    "zero": [("zero3", 3, 2), ("fsdp2", 2, 2), ("zero1", 2, 2)],
}
QUICK = dict(zip(PARTS, [["pca"], ["rows"], ["simplex"], ["orthonormal"], ["rows"], ["normalized"]], strict=True))


@pytest.mark.parametrize(
    ("parts", "name"), rest_slow(product(PARTS, CONFIGS), lambda parts, name: name in QUICK[parts])
)
def test_other_ranks_and_engines_continue_the_trajectory(
    ranks: Pool, uninterrupted: Callable[..., Any], tmp_path: Path, parts: str, name: str
) -> None:
    expected = uninterrupted("plain", 1, name)[0][0]
    for weights, *_ in run_parts(ranks, CONFIGS[name], PARTS[parts], tmp_path if name == "rows" else None):
        for tensor, value in expected.items():
            assert (weights[tensor] - value).norm() <= 1e-5 * value.norm(), tensor


def resume_refused(engine: str, config: dict[str, Any], state: bytes, paths: Any) -> dict[str, Tensor]:
    """Load a state. If it is refused, the weights and coefficients must not change."""
    model, twa = cases.attach(engine, Run(config), paths)
    before, a = cases.gathered(model), twa.coefficients.clone()
    try:
        twa.load_state_dict(torch.load(io.BytesIO(state), weights_only=True))
    except StateError:
        assert torch.equal(twa.coefficients, a)
        assert all(torch.equal(value, before[name]) for name, value in cases.gathered(model).items())
        raise
    return before


OTHER = {"basis": "pca", "groups": "tensor", "center": "last", "units": "weight"}


@pytest.fixture(scope="module")
def state_after_two_steps(ranks: Pool, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, int], bytes]:
    """Return the state after two steps of an engine on a number of ranks, from candidates in files; made once."""
    paths = save(tmp_path_factory.mktemp("begun"), models.candidates())
    options: dict[str, Any] = {"config": CONFIGS["normalized"], "first": 0, "last": 2, "state": None, "paths": paths}
    return cache(lambda engine, size: ranks(continue_run, size, engine=engine, **options)[0][2])


CHANGED = ["one element", "frozen", "swapped", "one less", *OTHER]


@pytest.mark.parametrize(
    ("engine", "size", "change"),
    rest_slow(
        [(engine, size, change) for engine, size in (("plain", 2), ("fsdp2", 3)) for change in CHANGED],
        lambda engine, _, change: engine == "plain" or change == "one element",
    ),
)
def test_a_state_of_something_else_is_refused_on_every_rank(
    ranks: Pool, state_after_two_steps: Callable[[str, int], bytes], tmp_path: Path, engine: str, size: int, change: str
) -> None:
    paths = save(tmp_path, models.candidates())
    config = dict(CONFIGS["normalized"])
    named = []
    if change in ("one element", "frozen"):
        tensors = load_file(paths[2])
        name = "blocks.1.down.weight" if change == "one element" else models.FROZEN
        tensors[name].view(-1)[-1] += 1e-4
        save_file(tensors, paths[2])
        named = [paths[2].name, name]
    elif change == "swapped":
        paths = [paths[1], paths[0], *paths[2:]]
        named = [paths[0].name]
    elif change == "one less":
        paths = paths[:-1]
    else:
        config[change] = OTHER[change]
        named = [change]
    error = ranks.error(
        resume_refused, size, engine=engine, config=config, state=state_after_two_steps(engine, size), paths=paths
    )
    assert isinstance(error, StateError), repr(error)
    for part in named:
        assert part in str(error), str(error)


def test_the_same_candidates_elsewhere_are_the_same(ranks: Pool, tmp_path: Path) -> None:
    """Their content is compared, not their paths."""
    (tmp_path / "here").mkdir()
    (tmp_path / "there").mkdir()
    first_directory, second_directory = (save(tmp_path / name, models.candidates()) for name in ("here", "there"))
    options: dict[str, Any] = {"engine": "fsdp2", "config": {}}
    state = ranks(continue_run, 2, **options, first=0, last=2, state=None, paths=first_directory)[0][2]
    ranks(continue_run, 2, **options, first=2, last=3, state=state, paths=second_directory)


def load_different_states() -> tuple[str, bool]:
    model, twa = cases.attach("fsdp2", Run(CONFIGS["normalized"]))
    states = [twa.state_dict()]
    for step in range(2):
        cases.one_step(model, twa, step)
        states.append(twa.state_dict())
    before = twa.coefficients
    messages = cases.error_text(lambda: twa.load_state_dict(states[cases.where()[0]]))
    return messages, torch.equal(twa.coefficients, before)


def test_ranks_that_load_different_states_are_refused(ranks: Pool) -> None:
    first, second = ranks(load_different_states, 2)
    assert first == second and first[1] and "state: x: it differs between rank 1 and rank 0" in first[0]


class Allocations(TorchDispatchMode):
    """The size of the largest memory that an operation makes, in bytes."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        inputs = {tensor.untyped_storage().data_ptr() for tensor in _tensors((args, kwargs))}
        for tensor in _tensors(out):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in inputs:
                self.largest = max(self.largest, storage.nbytes())
        return out


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


MANY, PIECE = 6000, 4096  # rows of a matrix; bytes of the buffer


def allocations_of_rows(directory: Path) -> dict[str, int]:
    """What this rank allocates and writes for the state of a matrix with many rows, which three ranks hold."""
    torch.manual_seed(0)  # Ranks may have drawn different numbers in earlier tests.
    states = [{"weight": torch.randn(MANY, 4)} for _ in range(3)]
    model = nn.Linear(4, MANY, bias=False)
    fully_shard(model)
    twa = twa_scale.attach(model, states, {"groups": "tensor+row", "optimizer": {"name": "adamw", "lr": 0.1}})
    model(torch.ones(1, 4)).square().sum().backward()
    twa.step()
    actual = {"rows of this rank": twa.copy_values().rows.nbytes}  # type: ignore[union-attr]
    written: list[int] = []
    write = OpenFile.write

    def counted(self: OpenFile, data: memoryview, offset: int) -> None:
        written.append(len(data))
        write(self, data, offset)

    with patch.object(stored, "PIECE_BYTES", PIECE), patch.object(OpenFile, "write", counted):
        with Allocations() as saving:
            state = twa.state_dict(directory)
        with Allocations() as loading:
            twa.load_state_dict(state, directory)
    with Allocations() as whole:
        twa.state_dict()
    return actual | {
        "saving": saving.largest,
        "loading": loading.largest,
        "whole": whole.largest,
        "written": sum(written),
        "largest write": max(written),
    }


def test_memory_of_saving_and_loading_rows(ranks: Pool, tmp_path: Path) -> None:
    """Whatever other ranks hold; the state with all rows on every rank takes the memory of all."""
    of_all = 4 * 3 * MANY
    for actual in ranks(allocations_of_rows, 3, directory=tmp_path):
        own = actual["rows of this rank"]
        assert own == of_all // 3 and actual["saving"] <= PIECE
        assert actual["loading"] == 2 * own, "the weights of rows, in float64, as in a step"
        assert actual["whole"] == of_all
        assert actual["written"] == 3 * own and actual["largest write"] <= PIECE, "y and two moments"


class Trainer:
    """Has what the optimizer looks at in transformers' Trainer, which is slow to import."""

    def __init__(self, twa: twa_scale.TrainableAverage, *callbacks: object) -> None:
        self.optimizer = SimpleNamespace(optimizer=twa.optimizer)  # as Accelerate wraps it
        self.callback_handler = SimpleNamespace(callbacks=callbacks)

    def train(self, call: Callable[[], Any]) -> Any:
        return call()


def load_where_one_rank_differs(directory: Path) -> list[str]:
    """What this rank says of a truncated file of rank 1, of a directory that only rank 1 gives, and of Trainers."""
    _, twa = cases.attach("plain", Run(CONFIGS["rows"]))
    rank = cases.where()[0]
    state, own = twa.state_dict(directory), directory / f"of-rank-{rank}"
    place = state["rows"]["stored"]["directory"]
    copy = Path(shutil.copytree(directory / place, own / place)) / "rows.safetensors"
    if rank == 1:
        os.truncate(copy, copy.stat().st_size - 4)
    only_one = directory if rank == 1 else None
    assert not load_coefficients(twa, directory)
    save_coefficients(twa, directory / "seen-by-0")
    with patch.dict(sys.modules, {"transformers.trainer": SimpleNamespace(Trainer=Trainer)}):
        saved = Trainer(twa, SimpleNamespace(saves=twa.optimizer)).train(twa.optimizer.state_dict)
        assert saved.keys() == twa.optimizer.state_dict().keys() - {"twa_scale"}
        of_trainers = [
            cases.error_text(lambda: Trainer(twa).train(twa.optimizer.state_dict)),
            cases.error_text(lambda: Trainer(twa).train(twa.optimizer.step)),
            cases.error_text(lambda: Trainer(twa, SimpleNamespace(saves=None)).train(twa.step)),
        ]
    return [
        cases.error_text(lambda: twa.load_state_dict(state, own)),
        cases.error_text(lambda: twa.load_state_dict(state, only_one)),
        cases.error_text(lambda: twa.state_dict(only_one)),
        cases.error_text(lambda: load_coefficients(twa, directory / f"seen-by-{rank}")),
        *of_trainers,
    ]


def test_rows_that_differ_on_one_rank_raise_on_all(ranks: Pool, tmp_path: Path) -> None:
    first, second = ranks(load_where_one_rank_differs, 2, directory=tmp_path)
    assert first == second
    for messages, wanted in zip(
        first,
        (
            "All ranks have to see the same file",
            *["on all ranks, or on none"] * 2,
            "seen-by-1/coefficients.pt: rank 1 does not see it, but rank 0 does",
            *["CoefficientsCallback(twa)"] * 3,
        ),
        strict=True,
    ):
        assert wanted in messages
