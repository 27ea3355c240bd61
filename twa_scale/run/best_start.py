"""`start: best`: evaluate the averages that need no training, and start at the best one."""

from collections.abc import Callable

from twa_scale.average.average import TrainableAverage
from twa_scale.config import Center, center_weights
from twa_scale.run.best import BestAverage

_EMA = ("ema:0.8", "ema:0.9", "ema:0.95")

# All averages are first evaluated on every fourth batch, and the best three of them on all batches. They use the same
# batches, so that their differences vary less than their losses.
SCREENED_BY = 4
FINALISTS = 3
MIN_BATCHES = 8  # so that every fourth batch gives at least two

Metrics = dict[str, float]


def averages(n: int, center: Center) -> list[str]:
    """Return the names of the averages of n candidates to evaluate, without those that equal `center`."""
    windows = [f"lawa:{2**i}" for i in range(1, n.bit_length()) if 2**i < n]
    others = ["last", *(["mean", *windows, *_EMA, "minus-sqrt"] if n > 1 else [])]
    known = center_weights(center, n)
    return ["center", *(name for name in others if center_weights(name, n) != known)]


def start_at_best(
    average: TrainableAverage,
    kept: BestAverage,
    measure: Callable[[int], Metrics],
    num_batches: int,
    log: Callable[[str], None],
) -> Metrics:
    """Evaluate the averages, start at the best one, and return its metrics on all batches. Collective.

    Averages that the basis cannot start from, such as the edges of the simplex, are skipped.

    Args:
        average: an average before its first step.
        kept: compares metrics.
        measure: returns the metrics of the current weights on each i-th held-out batch, given i.
        num_batches: the number of held-out batches.
        log: called with one line for each evaluation.
    """

    def evaluated(names: list[str], every: int, part: str = "") -> list[tuple[str, Metrics]]:
        """Return the averages and their metrics, the best first."""
        results: list[tuple[str, Metrics]] = []
        for name in names:
            with average.weights(name):
                metrics = measure(every)
            log(f"{name}{part}: " + ", ".join(f"{key} {value:.4f}" for key, value in metrics.items()))
            rank = sum(not kept.better(metrics, other) for _, other in results)
            results.insert(rank, (name, metrics))
        return results

    names = averages(average.num_candidates, average.config.center)
    finalists = names = [name for name in names if average.can_start_from(name)]
    if len(names) > FINALISTS and num_batches >= MIN_BATCHES:
        screened = -(-num_batches // SCREENED_BY)
        ordered = evaluated(names, SCREENED_BY, f" on {screened} of {num_batches} batches")
        finalists = [name for name, _ in ordered[:FINALISTS]]
    best, metrics = evaluated(finalists, 1)[0]
    log(f"start: {best}, the best of {len(names)} averages that need no training")
    average.start_from(best)
    return metrics
