"""`optimizer.lr: auto`: take a few steps with each of three rates, and train with the best on held-out data."""

import time
from math import isfinite

from twa_scale.average.rates import choose_rate
from twa_scale.average.state import RateState
from twa_scale.run.attached import AttachedRun

_MIN_STEPS, _MAX_STEPS = 5, 20


class InterruptedSearch(Exception):
    """A rank has received a signal during the search. Raised on all ranks, after the average was restored."""


def trial_steps(num_steps: int) -> int:
    """Return the number of steps of a trial: a tenth of the steps of the run, from 5 to 20, but at most all of them."""
    return min(num_steps, max(_MIN_STEPS, min(_MAX_STEPS, round(num_steps / 10))))


def position(step: int, count: int, num_steps: int) -> int:
    """Return the step of the run whose place in the schedule is that of `step` in a trial of `count` steps.

    A trial thus has the whole schedule: the warmup, and the low rates before the evaluation. At a constant rate, the
    noise of the last steps would favor lower rates, although the run ends with a lower rate.
    """
    return int((step + 0.5) * num_steps / count)


def search_rate(run: AttachedRun) -> RateState:
    """Try a third of the usual rate, the rate, and three times it, and set the best. Collective.

    The trials have the same start and the same batches, those of the first steps of the run. The end of a trial counts
    as an evaluation of the run, whose best average is kept.

    Args:
        run: the run, attached with the usual rate, before its first step.

    Raises:
        InterruptedSearch: a rank has received a signal.
        NotFiniteError: training diverges with each of the rates.
    """
    start, count = time.perf_counter(), trial_steps(run.num_steps)
    metric = f"{run.config.evaluate_split}/{run.kept.metric}"

    def train() -> None:
        run.report.log(f"optimizer.lr: {count} steps with {run.twa.config.lr:g}")
        for step in range(count):
            run.take_step(step, position(step, count, run.num_steps))
            if run.stopping:
                raise InterruptedSearch

    def score() -> float:
        metrics = run.measure()
        run.kept.update(0, metrics, run.twa, trial_lr=run.twa.config.lr)
        value = run.kept.value(metrics)
        run.report.log(f"optimizer.lr: {run.twa.config.lr:g} reaches {metric} {value:.4f}")
        return value

    usual = run.config.lr  # not the rate of a state that was saved before the first step
    rates = [usual / 3, usual, 3 * usual]
    chosen = choose_rate(run.twa, train, score, rates, higher_is_better=run.kept.higher)
    values = [trial.score if isfinite(trial.score) else None for trial in chosen.tried]
    rate = RateState(
        lr=chosen.best.lr,
        tried=[trial.lr for trial in chosen.tried],
        metric=metric,
        values=values,
        steps=count,
        seconds=time.perf_counter() - start,
    )
    run.report.log(_line(rate))
    return rate


def _line(rate: RateState) -> str:
    tried = ", ".join(
        f"{lr:g}: " + ("not finite" if value is None else f"{value:.4f}")
        for lr, value in zip(rate.tried, rate.values, strict=True)
    )
    n = len(rate.tried)
    return (
        f"optimizer.lr: {rate.lr:g} has the best {rate.metric} after {rate.steps} steps with each rate ({tried}); "
        f"the search took {n * rate.steps} steps and {n} evaluations, {rate.seconds:.1f} s"
    )
