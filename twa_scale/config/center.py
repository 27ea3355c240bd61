"""Fixed weights of candidates: the center that training starts around, and `twa-scale average --weights`."""

import re
from collections.abc import Sequence
from math import fsum, inf, isfinite

from twa_scale.errors import ConfigError

Center = str | int | list[float]

_SUM = 1e-6  # how far from 1 the sum of weights may be, which people round to a few digits
_NAMES = ("mean", "uniform", "linear", "minus-sqrt", "first", "last")
_EMA = ("ema", "ema-torch")
_LAWA = re.compile(r"lawa:0*([1-9]\d*)")


def parse_center(center: Center) -> Center:
    """Return a name, an index or a list for `center`; a text may hold an index, or numbers between commas or spaces.

    Raises:
        ValueError: any other text, for pydantic to report under its key.
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
    """Return the kind and the decay of `ema:DECAY` or `ema-torch:DECAY`."""
    kind, _, decay = name.partition(":")
    try:
        value = float(decay)
    except ValueError:
        value = -1.0
    if kind not in _EMA or not 0 < value < 1:
        raise ValueError(
            f"{name!r} is not a center; use mean (or uniform), ema:DECAY or ema-torch:DECAY with 0 < DECAY < 1, "
            "lawa:K (the mean of the last K), linear, minus-sqrt, first, last, the index of a candidate, or one weight "
            "per candidate"
        )
    return kind, value


def of_sum_one(weights: Sequence[float], *, normalize: bool = False) -> list[float]:
    """Return finite weights of sum 1: those that are given, without what rounding left of their sum, or scaled.

    Args:
        weights: any numbers; some may be negative.
        normalize: divide them by their sum, which has to be positive.

    Raises:
        ValueError: weights that are not finite, of another sum than 1, or of a sum that cannot be scaled to 1.
    """
    wrong = next((weight for weight in weights if not isfinite(weight)), None)
    if wrong is not None:
        raise ValueError(f"{wrong} is not a finite number; give one finite weight for each candidate")
    largest = max(map(abs, weights), default=0.0) or 1.0
    total = fsum(weight / largest for weight in weights) * largest  # the sum of large ones could overflow on its way
    if normalize and not _SUM * largest < total < inf:
        raise ValueError(f"weights of sum {total:g} cannot be scaled to sum 1; their sum has to be positive")
    if not normalize and not abs(total - 1) <= _SUM:
        raise ValueError(f"weights of sum {total:g}; they have to sum to 1")
    return [weight / total for weight in weights]


def check_index(index: str | int) -> None:
    """Raise ValueError, for pydantic to report under its key, for an index that counts from the end."""
    if isinstance(index, int) and index < 0:
        raise ValueError(f"{index} is no index of a candidate: they count from 0; use `last` for the last one")


def center_weights(center: Center, n: int, key: str = "center") -> list[float]:
    """Return the weights b_1..b_n (sum 1) of the center c = sum_i b_i w_i, candidates in training order.

    `lawa:K` is the mean of the last K candidates (LAWA, arXiv 2209.14981). `ema:d` weighs candidate i by d^(n-i) over
    the sum of these. `ema-torch:d` is what torch.optim.swa_utils makes of the candidates in order: d^(n-1) for the
    first, which it starts from, and (1 - d) d^(n-i) for the others. `linear` and `minus-sqrt` are the averages that a
    learning rate decayed by that shape would have made (WSM, arXiv 2507.17634): candidate i enters with the drop of
    the rate at i. A linear decay drops evenly, so for evenly spaced candidates `linear` is their mean.

    Args:
        center: as `parse_center` returns it.
        n: number of candidates.
        key: what messages call the setting.

    Raises:
        ConfigError: an index out of range, or weights that are not n numbers of sum 1.
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
            # rate(t) = 1 - t^power at t = 0, 1/n, ..., 1; candidate i carries the drop of the rate that follows it
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
    """Resolve `first`, `last` or an index (negative counts from the end) to 0..n-1.

    Raises:
        ConfigError: out of range.
    """
    if isinstance(index, str):
        return {"first": 0, "last": n - 1}[index]
    if not -n <= index < n:
        raise ConfigError(f"{key}: there is no candidate {index}; {n} candidates have indices 0 to {n - 1}.")
    return index % n
