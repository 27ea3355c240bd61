"""The size of a store, and the bytes that an update moves. `plan` and `bench` use them."""

from collections.abc import Iterable, Mapping

from twa_scale.config.kinds import StoreName
from twa_scale.store.make import span_bytes
from twa_scale.store.offloaded import BUFFER

_FLOAT32 = 4


def store_bytes(store: StoreName, n: int, sizes: Iterable[int]) -> int:
    """Return the bytes of a store for spans of these sizes in elements, as `span_bytes` does for one."""
    return sum(span_bytes(store, n, size) for size in sizes)


def staging_bytes(store: StoreName, n: int, sizes: Iterable[int]) -> int:
    """Return the bytes of the two buffers on a GPU for a store of this kind in host memory."""
    return 2 * min(BUFFER, max((span_bytes(store, n, size) for size in sizes), default=0))


def update_bytes(nbytes: int, elements: int, *, mapped: int = 0, weights: int | None = None) -> dict[str, int]:
    """Return the bytes that `project` and `combine` move on one rank, each counted once.

    `project` reads the deltas and the gradient; `combine` reads the deltas and the center, and writes the weights.

    Args:
        nbytes: the bytes of the store, which are those of the deltas and the center.
        elements: the number of trained elements of the rank.
        mapped: for store `mapped`, the bytes of the candidates' files that it reads instead of deltas. It also reads
            the center in both operations.
        weights: the bytes of the weights that are written; by default, those of float32.
    """
    vector = _FLOAT32 * elements  # of the center or the gradient
    deltas = nbytes - vector + mapped
    center = vector if mapped else 0
    written = vector if weights is None else weights
    return {"project": deltas + center + vector, "combine": deltas + vector + written}


def step_cost(seconds: Mapping[str, float], nbytes: Mapping[str, int], steps: int) -> dict[str, dict[str, float]]:
    """Return the mean seconds of the parts of a step, and the bytes that each moves.

    Args:
        seconds: the sums over the steps by part, from a `Clock`.
        nbytes: the bytes of one step, as `update_bytes` returns them.
        steps: the number of steps.
    """
    mean = {part: total / max(steps, 1) for part, total in seconds.items()}
    in_backward = mean.get("project in backward", 0.0)
    mean["project"] = in_backward + mean.get("project in step", 0.0)
    parts = {
        part: {"seconds": mean.get(part, 0.0), "bytes": nbytes.get(part, 0)}
        for part in ("project", "reduce", "combine", "publish")
    }
    parts["project"]["seconds_in_backward"] = in_backward
    parts["combine"]["seconds_in_forward"] = mean.get("combine in forward", 0.0)
    return parts
