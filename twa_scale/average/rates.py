"""Choose the learning rate of the coefficients: a few steps with each of several rates, from the same start."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import isfinite

from twa_scale.average.average import TrainableAverage
from twa_scale.average.score import agreed_score
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
    higher_is_better: bool = False,
) -> ChosenRate:
    """Train with each of several learning rates, and set `average` to the one with the best score. Collective.

    Each trial starts from the present coefficients, moments and buffers, which are restored at the end: what the trials
    reach is dropped. `average` has the rate of the trial while `train` and `score` run
    (`average.config.lr`, and `lr` of the parameter groups of its optimizer).

    Args:
        average: an average from `attach`.
        train: called on every rank; takes a few steps, on the same batches in each call.
        score: called on every rank after it; returns the same number on all ranks, of data that `train` does not use.
        rates: the rates to try; by default a third of the present rate, the rate, and three times it.
        higher_is_better: False for a loss.

    Raises:
        ConfigError: `rates` are not positive numbers, or a score is not a number or differs between ranks; on every
            rank.
        NotFiniteError: training has diverged with each of the rates. The average is as it was.
    """
    lr = average.config.lr
    chosen = [lr / 3, lr, 3 * lr] if rates is None else list(rates)
    require_same_settings(average.pods, {"rates": chosen, "higher_is_better": higher_is_better})
    with average.pods.agree():
        if not chosen or not all(isinstance(lr, int | float) and isfinite(lr) and lr > 0 for lr in chosen):
            raise ConfigError(f"choose_rate: rates are {chosen!r}; give one or more positive numbers.")
    back = average.remember()
    tried = []
    for lr in chosen:
        average.set_lr(lr)
        try:
            train()
            value = agreed_score(average.pods, score(), "choose_rate")
        except NotFiniteError:  # on every rank
            value = float("nan")
        back()
        tried.append(TriedRate(lr, value))
    finite = [trial for trial in tried if isfinite(trial.score)]
    if not finite:
        raise NotFiniteError(
            f"training diverges with each of the rates {', '.join(f'{lr:g}' for lr in chosen)}: look at the data and "
            "the loss, or give lower rates."
        )
    best = (max if higher_is_better else min)(finite, key=lambda trial: trial.score)
    average.set_lr(best.lr)
    return ChosenRate(tried, best)
