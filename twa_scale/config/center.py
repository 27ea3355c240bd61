"""Fixed weights of candidates: the center that training starts around."""

from twa_scale.errors import ConfigError

Center = str | int | list[float]


def ema_decay(center: str) -> float:
    """Return the decay of `ema:DECAY`.

    Raises:
        ValueError: any other text, for pydantic to report under its key.
    """
    kind, _, decay = center.partition(":")
    try:
        value = float(decay)
    except ValueError:
        value = -1.0
    if kind != "ema" or not 0 < value < 1:
        raise ValueError(
            f"{center!r} is not a center; use mean, ema:DECAY with 0 < DECAY < 1, linear, minus-sqrt, first, last, "
            "the index of a candidate, or one weight per candidate"
        )
    return value


def center_weights(center: Center, n: int) -> list[float]:
    """Return the weights b_1..b_n (sum 1) of the center c = sum_i b_i w_i, candidates in training order.

    `ema:d` weighs candidate i by d^(n-i); `linear` and `minus-sqrt` are the averages that a learning rate decayed by
    that shape would have made (WSM, arXiv 2507.17634): candidate i enters with the drop of the rate at i. A linear
    decay drops evenly, so for evenly spaced candidates `linear` is their mean.

    Raises:
        ConfigError: an index out of range, or weights that are not n numbers of sum 1.
    """
    if center == "first":
        center = 0
    elif center == "last":
        center = n - 1
    if isinstance(center, int):
        i = candidate_index(center, n, "center")
        return [float(j == i) for j in range(n)]
    if isinstance(center, list):
        if len(center) != n or not abs(sum(center) - 1) <= 1e-6:  # also for NaN
            raise ConfigError(
                f"center: {len(center)} weights of sum {sum(center):g} for {n} candidates; give one weight for "
                "each, of sum 1."
            )
        return [float(b) for b in center]
    if center == "mean":
        return [1 / n] * n
    if center in ("linear", "minus-sqrt"):
        power = 1.0 if center == "linear" else 0.5
        # rate(t) = 1 - t^power at t = 0, 1/n, ..., 1; candidate i carries the drop of the rate that follows it
        return [((i + 1) / n) ** power - (i / n) ** power for i in range(n)]
    decay = ema_decay(center)
    raw = [decay ** (n - 1 - i) for i in range(n)]
    return [value / sum(raw) for value in raw]


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


def buffer_weights(buffers: str | int, n: int) -> list[float]:
    """Return the weights of the candidates' floating point buffers: equal for `mean`, else all on one candidate.

    Raises:
        ConfigError: an index out of range.
    """
    return center_weights("mean" if buffers == "mean" else candidate_index(buffers, n, "buffers"), n)
