"""`twa_scale.search`: averages are evaluated by a score without gradient."""

from functools import partial
from itertools import combinations, repeat
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import twa_scale
from twa_scale.average.average import TrainableAverage
from twa_scale.average.search.methods import greedy, sweep

N = 5


def make(**config: Any) -> tuple[nn.Linear, TrainableAverage]:
    states = []
    for i in range(N):
        torch.manual_seed(i)
        states.append(nn.Linear(8, 3).state_dict())
    model = nn.Linear(8, 3)
    return model, twa_scale.attach(model, states, config or {"groups": "global"})


def distance(model: nn.Linear, target: Tensor) -> float:
    return (model.weight.detach() - target).square().sum().item()


def mean_of(*indices: int) -> Tensor:
    weights = []
    for i in indices:
        torch.manual_seed(i)
        weights.append(nn.Linear(8, 3).weight.detach())
    return torch.stack(weights).mean(0)


def test_a_sweep_finds_the_window() -> None:
    model, twa = make()
    target = mean_of(2, 3, 4)
    actual = twa_scale.search(twa, lambda: distance(model, target), "sweep", higher_is_better=False)
    assert actual.best.label == "lawa:3" and actual.best.score == pytest.approx(0, abs=1e-9)
    torch.testing.assert_close(model.weight.detach(), target)
    torch.testing.assert_close(twa.coefficients[:, 0], torch.tensor([0, 0, 1, 1, 1]).double() / 3, rtol=0, atol=1e-6)
    assert len(actual.evaluations) == sum(1 for _ in run(sweep(N), lambda a: 0.0))


def run(generator: Any, loss: Any) -> Any:
    """Yield the proposals of a method that receives `loss`."""
    proposal = next(generator)
    while True:
        yield proposal
        try:
            proposal = generator.send(loss(proposal.coefficients))
        except StopIteration:
            return


def test_the_greedy_soup_is_that_of_the_paper() -> None:
    """Recipe 1 of arXiv 2203.05482 in two loops, with a loss that is not convex."""
    random = np.random.default_rng(0)
    for _ in range(20):
        table = {members: random.random() for k in range(1, N + 1) for members in combinations(range(N), k)}

        def loss(a: Any, table: Any = table) -> float:
            return float(table[tuple(np.flatnonzero(a))])

        soup: list[int] = []
        for i in sorted(range(N), key=lambda i: table[(i,)]):
            if not soup or table[tuple(sorted([*soup, i]))] <= table[tuple(sorted(soup))]:
                soup.append(i)
        tried = list(run(greedy(N), loss))
        assert len(tried) == 2 * N - 1
        best = min(tried, key=lambda proposal: loss(proposal.coefficients))
        assert tuple(sorted(soup)) in [tuple(np.flatnonzero(p.coefficients)) for p in tried]
        assert loss(best.coefficients) <= table[tuple(sorted(soup))]


@pytest.mark.parametrize("constraint", ["sum", "simplex"])
def test_cma_comes_near_the_optimum(constraint: Any) -> None:
    pytest.importorskip("cma")
    model, twa = make(groups="global")
    target = 0.6 * mean_of(1) + 0.4 * mean_of(3)

    def score() -> float:
        return -distance(model, target)

    before = -score()
    actual = twa_scale.search(twa, score, "cma", budget=400, constraint=constraint, higher_is_better=True)
    assert -actual.best.score < 0.02 * before and -score() == pytest.approx(-actual.best.score, rel=1e-3)
    torch.testing.assert_close(twa.coefficients.sum(0), torch.ones(1).double())
    assert constraint == "sum" or bool((twa.coefficients > 0).all())


@pytest.mark.parametrize("method", ["sweep", "greedy", "cma"])
def test_interrupted_search_repeats_no_evaluation(tmp_path: Path, method: Any) -> None:
    pytest.importorskip("cma")
    model, twa = make(groups="tensor")
    calls = 0

    def score() -> float:
        nonlocal calls
        calls += 1
        np.random.random(calls)  # random numbers that a score draws do not change the proposals
        return distance(model, mean_of(0, 4))

    kwargs: dict[str, Any] = {"higher_is_better": False, "record": tmp_path / "a" / "search.jsonl"}
    twa_scale.search(twa, score, method, budget=7, **kwargs)
    assert calls == 7
    twa.start_from("center")
    actual = twa_scale.search(twa, score, method, budget=9, **kwargs)
    assert calls == 9
    model, twa = make(groups="tensor")
    whole = twa_scale.search(twa, lambda: distance(model, mean_of(0, 4)), method, budget=9, higher_is_better=False)
    assert [(e.label, e.score) for e in whole.evaluations] == [(e.label, e.score) for e in actual.evaluations]


def test_record_of_other_candidates_is_refused(tmp_path: Path) -> None:
    _, twa = make()
    record = tmp_path / "record"
    for text in ("{}\n", "[1]\n", "x\n", '{"twa_scale": "search", "format": 1, "candidates": "other"}\n', "\xff\n"):
        record.write_bytes(text.encode("latin-1"))
        with pytest.raises(twa_scale.StateError, match="record"):
            twa_scale.search(twa, lambda: 0.0, record=record, higher_is_better=True)
        assert record.read_bytes() == text.encode("latin-1")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "swep"}, "did you mean 'sweep'"),
        ({"budget": 0}, "budget"),
        ({"budget": True}, "budget"),
        ({"seed": -1}, "seed"),
        ({"constraint": "none"}, "constraint"),
    ],
)
def test_invalid_arguments_are_refused(arguments: dict[str, Any], message: str) -> None:
    _, twa = make()
    with pytest.raises(twa_scale.ConfigError, match=message):
        twa_scale.search(twa, lambda: 0.0, **arguments, higher_is_better=True)


def test_scores_must_be_numbers() -> None:
    _, twa = make()
    before = twa.coefficients
    scores: list[Any] = ["high", None, True, [1.0]]
    for score in scores:
        with pytest.raises(twa_scale.ConfigError, match="return a number"):
            twa_scale.search(twa, repeat(score).__next__, higher_is_better=True)
    with pytest.raises(twa_scale.TwaError, match="finite"):
        twa_scale.search(twa, lambda: float("nan"), higher_is_better=True)
    torch.testing.assert_close(twa.coefficients, before)
    actual = twa_scale.search(
        twa, iter([float("nan"), 1.0, float("inf"), *[0.5] * 100]).__next__, higher_is_better=True
    )
    assert actual.best.score == 1.0


@pytest.mark.parametrize("center", ["mean", "last"])
def test_the_best_average_is_set_exactly_or_the_basis_is_refused(center: str) -> None:
    """`pca` has the nearest weights in the space of its components."""
    _, twa = make(basis="pca", num_components=2, center=center)
    with pytest.raises(twa_scale.ConfigError, match="basis 'pca' of 2 components does not reach"):
        twa_scale.search(twa, lambda: 0.0, higher_is_better=True)
    for basis in ("pca", "orthonormal", "normalized"):
        model, twa = make(basis=basis, center=center)
        actual = twa_scale.search(twa, partial(distance, model, mean_of(1)), higher_is_better=False)
        assert distance(model, mean_of(1)) == pytest.approx(actual.best.score, rel=1e-4)


def test_the_simplex_and_many_groups_are_refused() -> None:
    _, twa = make(basis="simplex")
    with pytest.raises(twa_scale.ConfigError, match="basis"):
        twa_scale.search(twa, lambda: 0.0, higher_is_better=True)
    _, twa = make(groups="tensor")
    with pytest.raises(twa_scale.ConfigError, match="fewer groups"), pytest.MonkeyPatch.context() as patch:
        patch.setattr("twa_scale.average.search.methods._MAX_DIMENSIONS", 9)
        twa_scale.search(twa, lambda: 0.0, "cma", higher_is_better=True)
