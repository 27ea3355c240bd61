"""`start: best`: evaluate the averages that need no training, and start at the best one."""

from collections.abc import Callable

from twa_scale.average.average import TrainableAverage
from twa_scale.config import Center, center_weights
from twa_scale.run.best import BestAverage

_EMA = ("ema:0.8", "ema:0.9", "ema:0.95")


def averages(n: int, center: Center) -> list[str]:
    """Return the names of the averages of n candidates to evaluate, without those that equal `center`."""
    windows = [f"lawa:{2**i}" for i in range(1, n.bit_length()) if 2**i < n]
    others = ["last", *(["mean", *windows, *_EMA, "minus-sqrt"] if n > 1 else [])]
    known = center_weights(center, n)
    return ["center", *(name for name in others if center_weights(name, n) != known)]


def start_at_best(
    average: TrainableAverage,
    kept: BestAverage,
    measure: Callable[[], dict[str, float]],
    say: Callable[[str], None],
) -> str:
    """Evaluate the averages, start at the best one, and return its name. Collective.

    Averages that the basis cannot start from, such as the edges of the simplex, are skipped.

    Args:
        average: an average before its first step.
        kept: compares metrics.
        measure: returns the metrics of the current weights.
        say: called with one line for each average.
    """
    names = averages(average.num_candidates, average.config.center)
    names = [name for name in names if average.can_start_from(name)]
    best, of_best = "", dict[str, float]()
    for name in names:
        with average.weights(name):
            metrics = measure()
        say(f"{name}: " + ", ".join(f"{key} {value:.4f}" for key, value in metrics.items()))
        if not best or kept.better(metrics, of_best):
            best, of_best = name, metrics
    say(f"start: {best}, the best of {len(names)} averages that need no training")
    average.start_from(best)
    return best
