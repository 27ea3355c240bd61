"""Search averages by a score. Each evaluation writes the live weights once, and no checkpoint."""

from collections.abc import Callable
from contextlib import closing, nullcontext
from dataclasses import dataclass
from hashlib import sha256
from math import isfinite
from pathlib import Path
from typing import get_args

import torch

from twa_scale.average.average import TrainableAverage
from twa_scale.average.score import agreed_score
from twa_scale.average.search.methods import Constraint, Method, Proposal, Proposals, proposals
from twa_scale.average.search.record import Record, digest_of
from twa_scale.base.names import nearest, quoted
from twa_scale.base.notices import notice
from twa_scale.errors import ConfigError, TwaError
from twa_scale.ranks import require_same_settings


@dataclass(frozen=True)
class Evaluation:
    """An average and its score."""

    label: str
    coefficients: torch.Tensor
    """(n,) or (n, G), float64."""
    score: float


@dataclass(frozen=True)
class SearchResult:
    """The evaluations of a search, in order, and the best one."""

    evaluations: list[Evaluation]
    best: Evaluation


def search(
    average: TrainableAverage,
    score: Callable[[], float],
    method: Method = "sweep",
    *,
    higher_is_better: bool,
    budget: int = 200,
    constraint: Constraint = "sum",
    seed: int = 0,
    record: str | Path | None = None,
    tried: Callable[[Evaluation], object] = lambda _: None,
) -> SearchResult:
    """Evaluate averages of the candidates, and set `average` to the one with the best score. Collective.

    `sweep` evaluates the uniform averages of the last K candidates for every K, then exponential and `minus-sqrt`
    averages of all windows. `greedy` makes the greedy soup (arXiv 2203.05482). `cma` runs CMA-ES (arXiv 1604.00772) on
    the coefficients of all groups, starting at the current ones. For models with BatchNorm layers, call
    `average.recalibrate_batchnorm` in `score`.

    Args:
        average: an average from `attach`.
        score: called on every rank with the weights of an average in the model; returns the same number on all ranks.
            Use held-out data that no test uses.
        method: `sweep`, `greedy` or `cma`.
        higher_is_better: True for an accuracy, False for a loss.
        budget: the largest number of evaluations.
        constraint: for `cma`: `sum` keeps the sum of a group's coefficients, `simplex` also keeps them positive.
        seed: the seed of `cma`.
        record: the file of the scores. A search that is started again with it does not repeat evaluations.
        tried: called on every rank with each evaluation.

    Raises:
        ConfigError: an argument is invalid, or a score is not a number or differs between ranks; on every rank.
        StateError: the record is damaged or of other candidates.
        TwaError: no score was finite.
    """
    pods = average.pods
    arguments = {"method": method, "budget": budget, "higher_is_better": higher_is_better, "seed": seed}
    require_same_settings(pods, {**arguments, "constraint": constraint, "record": str(record)})
    with pods.agree():
        _check(average, method, budget, constraint, seed)
    _require_no_corrections(average)
    sign = -1.0 if higher_is_better else 1.0
    evaluations: list[Evaluation] = []
    proposer: _Proposer | None = None
    with pods.agree():
        if pods.rank == 0:
            source = proposals(method, average.coefficients.cpu().numpy(), constraint, seed)
            kept = None if record is None else Record(Path(record), _digest(average), notice)
            proposer = _Proposer(source, kept, sign)
    with closing(proposer) if proposer else nullcontext():
        while len(evaluations) < budget:
            proposed: tuple[Proposal | None, float | None] = (None, None)
            with pods.agree():
                if proposer:
                    proposed = proposer.next()
            proposal, known = pods.broadcast(proposed)
            if proposal is None:
                break
            a = torch.from_numpy(proposal.coefficients)
            value = _measured(average, score, a) if known is None else known
            if proposer:
                proposer.add(proposal, value, known=known is not None)
            evaluations.append(Evaluation(proposal.label, a, value))
            tried(evaluations[-1])
    finite = [evaluation for evaluation in evaluations if isfinite(evaluation.score)]
    if not finite:
        raise TwaError(f"search: none of {len(evaluations)} scores was a finite number.")
    best = min(finite, key=lambda evaluation: sign * evaluation.score)
    average.start_from(best.coefficients)
    return SearchResult(evaluations, best)


def _check(average: TrainableAverage, method: Method, budget: int, constraint: Constraint, seed: int) -> None:
    """Check the arguments before the first evaluation.

    Raises:
        ConfigError: names the argument.
    """
    for name, value, known in (("method", method, get_args(Method)), ("constraint", constraint, get_args(Constraint))):
        if value not in known:
            raise ConfigError(
                f"search: {name} {value!r} is unknown{nearest(str(value), known) or '.'} Use {quoted(known)}."
            )
    for name, number, minimum in (("budget", budget, 1), ("seed", seed, 0)):
        if isinstance(number, bool) or not isinstance(number, int) or number < minimum:
            raise ConfigError(f"search: {name} is {number!r}; give an integer of at least {minimum}.")
    basis = average.config.basis
    if not average.can_start_from("last"):
        raise ConfigError(
            f"search: basis {basis!r} cannot hold averages that leave candidates out. Attach with "
            "basis: normalized; constraint='simplex' keeps the coefficients of `cma` positive."
        )
    if not average.can_start_from(_uneven(average.num_candidates), exactly=True):
        raise ConfigError(
            f"search: basis {basis!r} of {average.config.num_components or 'all'} components does not reach all "
            "averages of the candidates, so that the best average could not be set. Attach with basis: normalized."
        )


def _uneven(n: int) -> torch.Tensor:
    """Return coefficients of sum 1 that differ in all directions: a linear basis that holds their average holds all."""
    parts = 1 + (torch.arange(n, dtype=torch.float64) * 0.6180339887) % 1
    return parts / parts.sum()


class _Proposer:
    """Proposes averages and records their scores. On one rank only, because methods may round differently on others.

    Args:
        source: the generator of the method.
        record: the file of the scores.
        sign: the factor from a score to the loss that the method minimizes.
    """

    def __init__(self, source: Proposals, record: Record | None, sign: float) -> None:
        self._source = source
        self._record = record
        self._sign = sign
        self._loss: float | None = None

    def next(self) -> tuple[Proposal | None, float | None]:
        """Return the next average, and its score if the record has it; (None, None) at the end."""
        try:
            proposal = next(self._source) if self._loss is None else self._source.send(self._loss)
        except StopIteration:
            return None, None
        return proposal, self._record.scores.get(digest_of(proposal.coefficients)) if self._record else None

    def add(self, proposal: Proposal, score: float, *, known: bool) -> None:
        """Set the score of the last proposal, and write it if it is not in the record."""
        if self._record and not known:
            self._record.add(proposal.label, proposal.coefficients, score)
        self._loss = self._sign * score

    def close(self) -> None:
        """Close the record."""
        if self._record:
            self._record.close()


def _require_no_corrections(average: TrainableAverage) -> None:
    corrected = any(bool(norms.any()) for norms in average.row_norms().values())
    with average.pods.agree():
        if corrected:
            raise ConfigError(
                "search: the rows of this average have trained corrections, which a search would drop. Search before "
                "training, or train with groups without '+row'."
            )


def _measured(average: TrainableAverage, score: Callable[[], float], coefficients: torch.Tensor) -> float:
    with average.weights(coefficients):
        value = score()
    return agreed_score(average.pods, value, "search")


def _digest(average: TrainableAverage) -> str:
    """Return a digest of the candidates and the groups, which the scores depend on."""
    hasher = sha256(average.fingerprint.checksums.cpu().numpy().tobytes())
    layout = average.layout
    hasher.update(repr(list(layout.group_of.items())).encode())
    if layout.experts:
        hasher.update(repr([(name, layout.groups_of(name)) for name in layout.experts]).encode())
    return hasher.hexdigest()
