"""Choose the learning rate of the coefficients: a few steps with each of several rates, from the same start."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import isfinite, log
from typing import Any

from twa_scale.average.average import TrainableAverage
from twa_scale.average.optimizer import checked_lr
from twa_scale.average.score import agreed_score
from twa_scale.base.notices import notice
from twa_scale.errors import ConfigError, NotFiniteError
from twa_scale.ranks import require_same_settings


@dataclass(frozen=True)
class TriedRate:
    """A learning rate and the score after its steps."""

    lr: float
    score: float
    """Not a finite number if training has diverged."""


@dataclass(frozen=True)
class ChosenRate:
    """The rates that were tried, in order, and the best one."""

    tried: list[TriedRate]
    best: TriedRate


def choose_rate(
    average: TrainableAverage,
    train: Callable[[], object],
    score: Callable[[], float],
    rates: Sequence[float] | None = None,
    *,
    higher_is_better: bool,
) -> ChosenRate:
    """Train with each of several learning rates, and set `average` to the one with the best score. Collective.

    Each trial starts from the current coefficients, moments and buffers of the module's state dict, which are restored
    at the end, also after an error. The results of the trials are dropped. `average` has the rate of the trial while
    `train` and `score` run (`average.config.lr`, and `lr` of the parameter groups of its optimizer). Create a scheduler
    of the whole training afterwards; `train` may create one for each trial. Among rates with the same score, the one
    nearest to the current rate is chosen, with a `TwaWarning`.

    Args:
        average: an average from `attach`.
        train: called on every rank. It takes a few steps, on the same batches in each call.
        score: called on every rank after `train`. It returns the same number on all ranks, computed on data that
            `train` does not use.
        rates: the rates to try; by default a third of the current rate, the rate, and three times the rate.
        higher_is_better: True for an accuracy, False for a loss.

    Raises:
        ConfigError: `rates` are not positive numbers, the optimizer has a scheduler, no step of `train` has changed the
            coefficients, or a score is not a number or differs between ranks; on every rank.
        NotFiniteError: training has diverged with each of the rates.
        Exception: an error of `train` or `score`; on every rank.
    """
    lr = average.config.lr
    with average.pods.agree():
        chosen = [lr / 3, lr, 3 * lr] if rates is None else [checked_lr(rate, "choose_rate: rates") for rate in rates]
        if not chosen:
            raise ConfigError("choose_rate: rates are empty; give one or more positive numbers.")
        if any("initial_lr" in group for group in average.optimizer.param_groups):
            raise ConfigError(
                "choose_rate: the optimizer has a scheduler, whose rates would replace those of the trials. Create it "
                "after choose_rate; `train` may create one for each trial."
            )
    require_same_settings(average.pods, {"rates": chosen, "higher_is_better": higher_is_better})
    restore = average.save_in_memory()
    tried = [TriedRate(rate, _score_of(average, rate, train, score, restore)) for rate in chosen]
    finite = [trial for trial in tried if isfinite(trial.score)]
    if not finite:
        raise NotFiniteError(
            f"training diverges with each of the rates {', '.join(f'{lr:g}' for lr in chosen)}: check the data and the "
            "loss, or give lower rates."
        )
    highest = (max if higher_is_better else min)(trial.score for trial in finite)
    equal = [trial for trial in finite if trial.score == highest]
    best = min(equal, key=lambda trial: abs(log(trial.lr / lr)))
    average.set_lr(best.lr)
    if len(equal) > 1 and average.pods.rank == 0:
        notice(
            f"the learning rates {', '.join(f'{trial.lr:g}' for trial in equal)} have the same score, {highest:g}: "
            f"{best.lr:g} is chosen. Take more steps with each, or a score of more data, to distinguish them."
        )
    return ChosenRate(tried, best)


def _score_of(
    average: TrainableAverage,
    lr: float,
    train: Callable[[], object],
    score: Callable[[], float],
    restore: Callable[[], None],
) -> float:
    """Return the score of a trial, or NaN if it diverges, and restore the state before it. Collective.

    Raises:
        Exception: an error of `train` or `score` on any rank. If other ranks may wait in a collective, this rank does
            not restore the state.
    """
    average.set_lr(lr)
    before = average.updates

    def train_some() -> None:
        train()
        if average.updates == before:
            raise ConfigError(
                f"choose_rate: no step of `train` changed the coefficients, with the learning rate {lr:g}: take more "
                "steps. With a loss scale, the first ones may overflow."
            )

    value: Any = None
    for call in (train_some, score):
        failure: BaseException | None = None
        try:
            value = call()
        except BaseException as error:
            failure = error
        failure = average.together(failure)
        if failure is not None:
            diverged = all(average.pods.gather(isinstance(failure, NotFiniteError)))
            restore()
            if diverged:
                return float("nan")
            raise failure
    try:
        agreed = agreed_score(average.pods, value, "choose_rate")
    except ConfigError:
        restore()
        raise
    restore()
    return agreed
