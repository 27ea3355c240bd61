"""Fixed weights of candidates, for the setting `center` and for `twa-scale average --weights`."""

import re
from collections.abc import Sequence
from math import fsum, inf, isfinite

from twa_scale.base.names import nearest
from twa_scale.errors import ConfigError

Center = str | int | list[float]

_SUM = 1e-6  # tolerance of the sum of weights, which users round to a few digits
_NAMES = ("mean", "uniform", "linear", "minus-sqrt", "first", "last")
_EMA = ("ema", "ema-torch")
_LAWA = re.compile(r"lawa:0*([1-9]\d*)")


def parse_center(center: Center) -> Center:
    """Return a name, an index or a list for `center`, which may be text of an index or of several numbers.

    Numbers are separated by commas or spaces.

    Raises:
        ValueError: the text is not a center; pydantic adds the key.
    """
    if not isinstance(center, str):
        return center
    text = center.strip()
    if re.fullmatch(r"[-+]?\d+", text):
        return int(text)
    try:
        return [float(number) for number in re.split(r"[\s,]+", re.sub(r"^[\[(]\s*|\s*[\])]$", "", text))]
    except ValueError:
        pass
    name = re.sub(r"\s*:\s*", ":", text.lower())
    if name not in _NAMES and not _LAWA.fullmatch(name):
        _ema(name)
    return name


def _ema(name: str) -> tuple[str, float]:
    """Return the kind and the decay of `ema:DECAY` or `ema-torch:DECAY`.

    Raises:
        ValueError: `name` is not a center.
    """
    kind, _, decay = name.partition(":")
    try:
        value = float(decay)
    except ValueError:
        value = -1.0
    if kind not in _EMA or not 0 < value < 1:
        raise ValueError(
            f"{name!r} is not a center; use mean (or uniform), ema:DECAY or ema-torch:DECAY with 0 < DECAY < 1, "
            "lawa:K (the mean of the last K), linear, minus-sqrt, first, last, the index of a candidate, or one weight "
            f"per candidate{nearest(name, _NAMES)}"
        )
    return kind, value


def of_sum_one(weights: Sequence[float], *, normalize: bool = False) -> list[float]:
    """Return `weights` divided by their sum, which has to be 1 up to rounding unless `normalize` is set.

    Args:
        weights: any numbers; some may be negative.
        normalize: accept any positive sum.

    Raises:
        ValueError: a weight is not finite, the sum is not 1, or it is not positive and finite.
    """
    wrong = next((weight for weight in weights if not isfinite(weight)), None)
    if wrong is not None:
        raise ValueError(f"{wrong} is not a finite number; give one finite weight for each candidate")
    largest = max(map(abs, weights), default=0.0) or 1.0
    total = fsum(weight / largest for weight in weights) * largest  # scaled: partial sums could overflow
    if normalize and not _SUM * largest < total < inf:
        raise ValueError(f"weights of sum {total:g} cannot be scaled to sum 1; their sum has to be positive")
    if not normalize and not abs(total - 1) <= _SUM:
        raise ValueError(f"weights of sum {total:g}; they have to sum to 1")
    return [weight / total for weight in weights]


def check_index(index: str | int) -> None:
    """Check that an index does not count from the end.

    Raises:
        ValueError: the index is negative; pydantic adds the key.
    """
    if isinstance(index, int) and index < 0:
        raise ValueError(f"{index} is not an index of a candidate: indices start at 0; use `last` for the last one")


def center_weights(center: Center, n: int, key: str = "center") -> list[float]:
    """Return the weights b_1..b_n (sum 1) of the center c = sum_i b_i w_i, candidates in training order.

    `lawa:K` is the mean of the last K candidates (LAWA, arXiv 2209.14981). `ema:d` weights candidate i by d^(n-i),
    divided by the sum of these. `ema-torch:d` is the EMA of torch.optim.swa_utils over the candidates in order: the
    first has the weight d^(n-1), the others (1 - d) d^(n-i). `linear` and `minus-sqrt` correspond to a learning rate
    decay of that shape (WSM, arXiv 2507.17634): the weight of candidate i is the decrease of the rate after it. A
    linear decay decreases by equal amounts, so `linear` is the mean of evenly spaced candidates.

    Args:
        center: a result of `parse_center`.
        n: the number of candidates.
        key: the name of the setting for messages.

    Raises:
        ConfigError: the index is out of range, or the weights are not n numbers with sum 1.
    """
    match center:
        case int() | "first" | "last":
            i = candidate_index(center, n, key)
            return [float(j == i) for j in range(n)]
        case list():
            if len(center) != n:
                raise ConfigError(f"{key}: {len(center)} weights for {n} candidates; give one weight for each.")
            try:
                return of_sum_one(center)
            except ValueError as error:
                raise ConfigError(f"{key}: {error}.") from None
        case "mean" | "uniform":
            return [1 / n] * n
        case "linear" | "minus-sqrt":
            power = 1.0 if center == "linear" else 0.5
            # rate(t) = 1 - t^power at t = 0, 1/n, ..., 1; the weight of candidate i is rate(i / n) - rate((i + 1) / n)
            return [((i + 1) / n) ** power - (i / n) ** power for i in range(n)]
    if lawa := _LAWA.fullmatch(center):
        last = int(lawa[1])
        if last > n:
            raise ConfigError(f"{key}: {center!r} is the mean of the last {last} candidates, and there are {n}.")
        return [0.0] * (n - last) + [1 / last] * last
    kind, decay = _ema(center)
    raw = [decay ** (n - 1 - i) for i in range(n)]
    if kind == "ema":
        return [value / fsum(raw) for value in raw]
    return [raw[0], *((1 - decay) * value for value in raw[1:])]


def candidate_index(index: str | int, n: int, key: str) -> int:
    """Return the index 0..n-1 of `first`, `last` or an index; negative ones count from the end.

    Raises:
        ConfigError: the index is out of range.
    """
    if isinstance(index, str):
        return {"first": 0, "last": n - 1}[index]
    if not -n <= index < n:
        raise ConfigError(f"{key}: there is no candidate {index}; {n} candidates have indices 0 to {n - 1}.")
    return index % n
