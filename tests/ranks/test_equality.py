"""Every engine at every number of ranks gives the result of one process with whole float64 candidates."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import cache
from itertools import combinations, product
from typing import Any

import pytest
import torch
from torch import Tensor

from tests import flattened, meshes, models, reference, zero
from tests.grid import grid
from tests.pool import Pool
from tests.ranks import cases
from tests.ranks.cases import Run, RunResult

ENGINES = ["plain", "ddp", "fsdp2"]
SIZES = [1, 2, 3]
BASES = ["normalized", "orthonormal", "pca", "simplex"]
GROUPINGS: dict[str, Any] = {"global": "global", "block": "block", "tensor": "tensor", "patterns": models.PATTERNS}
ADAMW = {"delta": {"name": "adamw", "lr": 0.03}, "weight": {"name": "adamw", "lr": 0.005}}
SGD = {"delta": {"name": "sgd", "lr": 0.005, "momentum": 0.9}, "weight": {"name": "sgd", "lr": 1e-3, "momentum": 0.9}}


def _grid() -> dict[str, Run]:
    """Return every basis with every grouping. Optimizers and units alternate."""
    settings = list(product(["delta", "weight"], [ADAMW, SGD]))
    runs = {}
    for (i, basis), (j, grouping) in product(enumerate(BASES), enumerate(GROUPINGS)):
        units, optimizer = settings[(i + j) % 4]
        config = {"basis": basis, "groups": GROUPINGS[grouping], "units": units, "optimizer": optimizer[units]}
        if basis == "simplex" and optimizer is SGD:
            config["optimizer"] = SGD["delta"] | {"lr": 0.2}
        runs[f"{basis}-{grouping}"] = Run(config)
    return runs


GRID = _grid()
MORE = {
    "accumulated": Run({"groups": "block", "optimizer": ADAMW["delta"]}, accumulate=2),
    "start-last": Run({"groups": "block", "start": "last", "optimizer": ADAMW["delta"]}),
    "orthonormal-tensor-delta": Run({"basis": "orthonormal", "groups": "tensor", "optimizer": ADAMW["delta"]}),
    "start-index-orthonormal": Run(
        {"basis": "orthonormal", "groups": "block", "start": 1, "optimizer": ADAMW["delta"]}
    ),
    "start-first-pca": Run({"basis": "pca", "start": "first", "optimizer": SGD["delta"]}),
    "center-ema": Run({"center": "ema:0.6", "groups": "block", "optimizer": ADAMW["delta"]}),
    "center-ema-simplex": Run({"basis": "simplex", "center": "ema:0.6", "optimizer": ADAMW["delta"]}),
    "center-ema-pca": Run({"basis": "pca", "center": "ema:0.6", "optimizer": ADAMW["delta"]}),
    "center-last": Run({"center": "last", "groups": "tensor", "optimizer": ADAMW["delta"]}),
    "center-last-orthonormal": Run({"basis": "orthonormal", "center": "last", "optimizer": ADAMW["delta"]}),
    "center-index": Run({"center": 1, "optimizer": SGD["delta"]}),
    "center-linear": Run({"center": "linear", "optimizer": SGD["delta"]}),
    "center-minus-sqrt": Run({"center": "minus-sqrt", "optimizer": SGD["delta"]}),
    "center-explicit": Run({"center": [0.4, 0.3, 0.2, 0.1], "groups": "block", "optimizer": ADAMW["delta"]}),
    "center-explicit-negative": Run({"center": [-0.5, 0.5, 0.5, 0.5], "basis": "pca", "optimizer": ADAMW["delta"]}),
    "include": Run({"include": ["blocks", "embed"], "groups": "block", "optimizer": ADAMW["delta"]}),
    "exclude": Run({"exclude": ["norm", r"\.bias$"], "center": "ema:0.6", "optimizer": ADAMW["delta"]}),
    "clipped": Run({"max_grad_norm": 0.5, "groups": "block", "optimizer": SGD["delta"] | {"lr": 0.05}}),
    "two-components": Run({"basis": "pca", "num_components": 2, "groups": "block", "optimizer": ADAMW["delta"]}),
    "decayed": Run({"groups": "block", "optimizer": ADAMW["delta"] | {"weight_decay": 0.5}}),
    "decayed-orthonormal": Run(
        {
            "basis": "orthonormal",
            "groups": "tensor",
            "units": "weight",
            "optimizer": SGD["weight"] | {"weight_decay": 3.0},
        }
    ),
    "rows": Run({"groups": "tensor+row", "optimizer": ADAMW["delta"] | {"row_lr": 0.01}}),
    "rows-of-blocks": Run(
        {"basis": "pca", "groups": "block+row", "center": "ema:0.6", "start": "last", "optimizer": SGD["delta"]},
        accumulate=2,
    ),
    "rows-clipped": Run(
        {"groups": "tensor+row", "max_grad_norm": 0.5, "units": "weight"}
        | {"optimizer": SGD["weight"] | {"lr": 0.01, "row_lr": 0.02}}
    ),
    "scalar-of-shape-1": Run({"groups": "tensor", "optimizer": ADAMW["delta"]}, scalar_shape=(1,)),
}
ROUNDED = {
    **{s: Run({"store": s, "groups": "block", "optimizer": SGD["delta"]}) for s in ("dense16", "packed8", "packed4")},
    "mapped": Run({"store": "mapped", "groups": "block", "optimizer": SGD["delta"]}),
    "bfloat16": Run({"groups": "block", "optimizer": SGD["delta"]}, bf16=True),
}
IN_INCREMENTS: dict[str, Any] = {
    "normalized": {"start": "last"},
    "normalized-center-ema": {"center": "ema:0.6", "start": "first"},
    "normalized-center-last": {"center": "last", "start": 1},
    "orthonormal": {"start": "first"},
    "pca": {"center": 1},
    "simplex": {"center": "ema:0.6"},
}
INCREMENTS = {
    f"increments-{name}": Run(
        {"store": "packed8", "coding": "increments", "basis": name.split("-")[0], "groups": "block"}
        | {"optimizer": SGD["delta"] | {"lr": 0.05}}
        | config
    )
    for name, config in IN_INCREMENTS.items()
}
LONG = "normalized-block"


def num_steps(name: str) -> int:
    """Return the steps of a run. All but one differ in what is set up before the first step.

    Corrections of rows and increments need six steps to have an effect, and `simplex` four, which tests below require.
    """
    if name == LONG:
        return cases.NUM_STEPS
    return 6 if name in INCREMENTS or "rows" in name else 4 if "simplex" in name else 3


ALL = {name: replace(run, steps=num_steps(name)) for name, run in (GRID | MORE | ROUNDED | INCREMENTS).items()}

# Every basis and every grouping, with two passes per step.
EACH_ONCE = [LONG, "orthonormal-tensor", "pca-global", "simplex-patterns", "accumulated", "rows"]
PLACES = [(engine, size) for engine in ENGINES for size in SIZES]
PLACES += [(engine, size) for engine in flattened.ENGINES for size in SIZES]
PLACES += [(engine, size) for engine in zero.ENGINES for size in SIZES]
PLACES += [(engine, size) for engine in meshes.ENGINES for size in meshes.SIZES[engine]]


def runs_of(engine: str, size: int) -> list[str]:
    """Return all settings for the first engines with two ranks. Engines determine their number of ranks."""
    if engine in flattened.ENGINES:
        return [LONG, "orthonormal-tensor", "accumulated", "rows", "scalar-of-shape-1", "increments-normalized"]
    if engine in zero.ENGINES:
        return [*EACH_ONCE, "increments-orthonormal", *(["bfloat16"] if size == 2 else [])]
    if engine in meshes.ENGINES:
        return EACH_ONCE if size == 2 or engine == "fsdp2-tp" else EACH_ONCE[:2]
    names = list(ALL) if size == 2 else [*EACH_ONCE, "scalar-of-shape-1", *INCREMENTS]
    return [name for name in names if engine == "fsdp2" or not ALL[name].bf16]


def options_of(engine: str, size: int, name: str) -> list[str]:
    """Return the options to pair: an engine with its ranks, and the settings of a run."""
    if name not in GRID:
        return [engine, str(size), name]
    config = GRID[name].config
    basis, grouping = name.split("-")
    return [engine, str(size), basis, grouping, config["units"], config["optimizer"]["name"]]


# Engines that hold, reduce and write the same elements in the same way.
ALIKE = {"ddp": "replicas", "plain": "replicas"}
FLAT = dict.fromkeys([*flattened.ENGINES, "zero1", "zero2"], "flat")
OF_AN_ENGINE = ("basis", "groups", "units", "optimizer", "row_lr", "accumulate")


def settings_of(name: str) -> dict[str, str]:
    """Return the settings of a run by name, also those that it leaves out where others give them."""
    run = ALL[name]
    optimizer = dict(run.config["optimizer"])
    settings = {"basis": "normalized", "groups": "global", "center": "mean", "start": "center", "units": "delta"}
    settings |= run.config | {"optimizer": optimizer.pop("name"), "accumulate": run.accumulate}
    settings |= dict.fromkeys(optimizer.keys() & {"row_lr", "weight_decay"}) | {"shape": run.scalar_shape}
    return {key: str(value) for key, value in settings.items()}


def shown_by(engine: str, size: int, name: str) -> Iterator[Any]:
    """Yield what a run shows: an engine at a number of ranks and with its main settings, and pairs of settings.

    Engines that are alike show the other settings together.
    """
    settings = settings_of(name)
    yield engine, size
    yield from ((engine, setting) for setting in settings.items() if setting[0] in OF_AN_ENGINE)
    yield from ((ALIKE.get(engine, engine), setting) for setting in settings.items())
    yield from combinations(sorted(settings.items()), 2)


def shown_in_increments(engine: str, size: int, name: str) -> list[Any]:
    """Return what a run with increments shows: its engine, and of engines that are alike, a size and a basis."""
    alike = (ALIKE | FLAT).get(engine, engine)
    return [engine, (alike, size), (alike, name)]


def group_of(engine: str, size: int, *_: object) -> str:
    """Return the mark with which one process makes all runs of an engine at a number of ranks."""
    return f"equality-{engine}-{size}"


CASES = grid(
    [(e, s, name) for e, s in PLACES for name in runs_of(e, s) if name not in ROUNDED | INCREMENTS],
    options_of,
    group_of,
    shown_by,
)
CASES_OF_INCREMENTS = grid(
    [(e, s, name) for e, s in PLACES for name in runs_of(e, s) if name in INCREMENTS],
    options_of,
    group_of,
    shown_in_increments,
)
Ends = Callable[[str, int], list[dict[str, RunResult]]]


def grouped(cases: Iterable[tuple[Any, ...]]) -> list[Any]:
    """Return cases that begin with engine and size, with the mark of the process that makes their runs.

    DDP holds and writes what one process does, so its cases are slow.
    """
    return [
        pytest.param(*case, marks=[pytest.mark.xdist_group(group_of(*case)), *[pytest.mark.slow] * (case[0] == "ddp")])
        for case in cases
    ]


@pytest.fixture(scope="session")
def run_results(ranks: Pool, request: pytest.FixtureRequest) -> Ends:
    """Return the runs of one engine and number of ranks, made once: a list by rank of results by name."""
    positions = [item.callspec.params for item in request.session.items if hasattr(item, "callspec")]
    asked = {(p["engine"], p["size"], p["name"]) for p in positions if p.keys() >= {"engine", "size", "name"}}

    @cache
    def run_all(engine: str, size: int) -> list[dict[str, RunResult]] | AssertionError:
        runs = {name: ALL[name] for name in runs_of(engine, size) if (engine, size, name) in asked}
        try:
            return ranks(cases.train_all, size, timeout=60 + 15 * len(runs), engine=engine, runs=runs)
        except AssertionError as failure:  # the time limit of a hang applies once
            return failure

    def checked(engine: str, size: int) -> list[dict[str, RunResult]]:
        result = run_all(engine, size)
        if isinstance(result, AssertionError):
            raise result
        return result

    return checked


@cache
def expected(name: str, size: int) -> reference.Trained:
    run = ALL[name]
    steps = [cases.micro_batches(step, size, run.accumulate) for step in range(run.steps)]
    candidates = models.candidates(scalar_shape=run.scalar_shape)
    return reference.train(models.build(scalar_shape=run.scalar_shape), models.loss, candidates, run.config, steps)


def errors(weights: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    """Return the relative error of each tensor, in norm."""
    assert weights.keys() == expected.keys()
    return {name: float((weights[name].double() - w).norm() / w.norm()) for name, w in expected.items()}


def require_close(ended: RunResult, weights: dict[str, Tensor], tolerance: float) -> None:
    assert not ended.error, ended.error
    wrong = {name: f"{e:.1e}" for name, e in errors(ended.weights, weights).items() if not e <= tolerance}
    assert not wrong, f"relative errors above {tolerance}: {wrong}"


def distance_from_center(name: str, weights: dict[str, Tensor]) -> float:
    states = models.candidates(scalar_shape=ALL[name].scalar_shape)
    b = reference.center_weights(ALL[name].config.get("center", "mean"), len(states))
    center = {key: torch.tensordot(b, torch.stack([state[key].double() for state in states]), 1) for key in weights}
    return float(torch.stack([(weights[key] - center[key]).square().sum() for key in weights]).sum().sqrt())


@pytest.mark.parametrize(("engine", "size", "name"), CASES)
class TestEquality:
    def test_weights_are_those_of_the_reference(self, run_results: Ends, engine: str, size: int, name: str) -> None:
        target = expected(name, meshes.data_ranks(engine, size)).weights[-1]
        distance = distance_from_center(name, target)
        for by_name in run_results(engine, size):
            require_close(by_name[name], target, 1e-5)
            assert by_name[name].distance == pytest.approx(distance, rel=1e-4)

    def test_coefficients_are_those_of_the_reference(
        self, run_results: Ends, engine: str, size: int, name: str
    ) -> None:
        """If dependent candidates allow several coefficients, they must give the right weights."""
        target = expected(name, meshes.data_ranks(engine, size))
        ended = run_results(engine, size)[0][name]
        assert not ended.error, ended.error
        a = ended.coefficients.double()
        assert a.shape == target.coefficients[-1].shape
        states = models.candidates(scalar_shape=ALL[name].scalar_shape)
        for column, members in enumerate(target.groups.values()):
            unique = target.coefficients[-1][:, column]
            if not unique.isnan().any():
                torch.testing.assert_close(a[:, column], unique, rtol=1e-4, atol=1e-4)
            for member in members:
                values = torch.stack([state[member].double() for state in states])
                of_rows = a[:, column].view(-1, *[1] * (values.dim() - 1))
                if member in ended.corrections:
                    of_rows = of_rows + ended.corrections[member].view(*values.shape[:2], *[1] * (values.dim() - 2))
                inputs = (of_rows * values).sum(0)
                assert (inputs - target.weights[-1][member]).norm() <= 1e-4 * target.weights[-1][member].norm(), member

    def test_coefficients_are_the_same_bits_on_every_rank(
        self, run_results: Ends, engine: str, size: int, name: str
    ) -> None:
        first, *others = [by_name[name] for by_name in run_results(engine, size)]
        for other in others:
            assert torch.equal(first.coefficients, other.coefficients)
            assert all(torch.equal(value, other.corrections[key]) for key, value in first.corrections.items())
            assert first.distance == other.distance


TOLERANCES = {"dense16": 1e-2, "packed8": 1e-2, "packed4": 3e-2, "mapped": 1e-5}


@pytest.mark.parametrize(("engine", "size", "name"), grouped((e, 2, store) for e in ENGINES for store in TOLERANCES))
def test_stores_match_the_reference_within_their_rounding(run_results: Ends, engine: str, size: int, name: str) -> None:
    """The store rounds deltas, not gradients and weights. `mapped` rounds nothing."""
    for by_name in run_results(engine, size):
        require_close(by_name[name], expected(name, size).weights[-1], TOLERANCES[name])


@pytest.mark.parametrize(("engine", "size", "name"), CASES_OF_INCREMENTS)
def test_increments_match_the_reference_within_their_rounding(
    run_results: Ends, engine: str, size: int, name: str
) -> None:
    """Rows are increments with rounded codes. Bases, starts, centers and coefficients are not rounded."""
    target = expected(name, meshes.data_ranks(engine, size))
    for by_name in run_results(engine, size):
        require_close(by_name[name], target.weights[-1], 1e-2)
        a = by_name[name].coefficients.double()
        known = ~target.coefficients[-1].isnan()
        torch.testing.assert_close(a[known], target.coefficients[-1][known], rtol=0, atol=1e-2)
        assert torch.equal(a, run_results(engine, size)[0][name].coefficients.double())


def test_training_with_increments_changes_more_than_the_tolerance() -> None:
    for name in INCREMENTS:
        result = expected(name, 1)
        moved = (result.coefficients[-1] - result.coefficients[0]).nan_to_num().abs().max()
        assert moved > 2e-2, (name, moved)


@pytest.mark.parametrize(("engine", "size", "name"), grouped([("fsdp2", 2, "bfloat16")]))
def test_bfloat16_computation_is_close_to_the_reference(run_results: Ends, engine: str, size: int, name: str) -> None:
    """Gradients of MixedPrecisionPolicy(param_dtype=bfloat16) are rounded. The weights remain float32."""
    for by_name in run_results(engine, size):
        require_close(by_name[name], expected(name, size).weights[-1], 3e-2)
        assert all(value.dtype == torch.float32 for value in by_name[name].weights.values())


@pytest.mark.parametrize(("engine", "size", "name"), grouped((e, 2, "bfloat16") for e in zero.ENGINES))
def test_bfloat16_copies_of_the_weights_are_close_to_the_reference(
    run_results: Ends, engine: str, size: int, name: str
) -> None:
    """DeepSpeed returns its bfloat16 copies. Its gradients are rounded, too."""
    for by_name in run_results(engine, size):
        require_close(by_name[name], expected(name, size).weights[-1], 1e-2)
        assert all(value.dtype == torch.bfloat16 for value in by_name[name].weights.values())


def test_rows_have_corrections_of_their_own() -> None:
    """Without the corrections the result of the reference differs by more than the tolerance."""
    for name in ("rows", "rows-of-blocks", "rows-clipped"):
        run = ALL[name]
        groups = str(run.config["groups"]).removesuffix("+row")
        optimizer = {key: value for key, value in run.config["optimizer"].items() if key != "row_lr"}
        steps = [cases.micro_batches(step, 1, run.accumulate) for step in range(run.steps)]
        config = {**run.config, "groups": groups, "optimizer": optimizer}
        without = reference.train(models.build(), models.loss, models.candidates(), config, steps).weights[-1]
        assert max(errors(without, expected(name, 1).weights[-1]).values()) > 1e-4, name


def test_training_moves_the_weights() -> None:
    """Every run changes every trained group by more than ten times the tolerance of the tests above."""
    for name in [*GRID, *MORE]:
        result = expected(name, 1)
        for group, members in result.groups.items():
            moved = max(errors(result.weights[-1], result.weights[0])[m] for m in members)
            assert moved > 1e-4 or members == [models.EQUAL], (name, group, moved)
