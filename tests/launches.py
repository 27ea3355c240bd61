"""The number of kernel launches of a step for a 70B Llama on 64 ranks, with each engine: `python -m tests.launches`.

The time between launches is what many small tensors cost. docs/performance.md has the table.
"""

from collections.abc import Iterator, Sequence
from itertools import accumulate
from math import prod

import torch

from twa_scale.base.spans import share
from twa_scale.kernels import Packed
from twa_scale.kernels.triton.programs import COMBINE, PROJECT, launches

Shape = tuple[int, ...]
RANKS, CANDIDATES, BITS = 64, 16, 4
GAP = 5e-6
"""Seconds from one small kernel to the next."""
TOKENS, FLOPS = 8192, 0.4 * 990e12
"""Tokens of a rank in a step, and what an H100 reaches of its bfloat16 rate in training."""
BESIDE = 4
"""Small kernels of torch that follow a project: sum over programs, a zero for the center, put together, added up."""


def llama(width: int, inner: int, layers: int, key_value: int, vocabulary: int) -> list[list[Shape]]:
    """Return the shapes of each unit that FSDP gathers: the blocks, then the other tensors."""
    attention: list[Shape] = [(width, width), (key_value, width), (key_value, width), (width, width)]
    block = [*attention, (inner, width), (inner, width), (width, inner), (width,), (width,)]
    return [block] * layers + [[(vocabulary, width), (width,), (vocabulary, width)]]


UNITS = llama(8192, 28672, 80, 1024, 128256)
LLAMA_70B = [shape for unit in UNITS for shape in unit]


def rows_of(shape: Shape, rank: int, ranks: int) -> int:
    """Return the elements of a rank if whole rows are distributed, as in FSDP2."""
    start, stop = share(shape[0], rank, ranks)
    return (stop - start) * prod(shape[1:])


def spans(engine: str, rank: int = RANKS // 2) -> list[tuple[int, int]]:
    """Return (start in its tensor, elements) of the spans that a rank owns."""
    match engine:
        case "FSDP2":
            starts = [share(shape[0], rank, RANKS)[0] * prod(shape[1:]) for shape in LLAMA_70B]
            return [(start, rows_of(shape, rank, RANKS)) for start, shape in zip(starts, LLAMA_70B, strict=True)]
        case "DDP, ZeRO-3":
            return [(start, stop - start) for start, stop in (share(prod(s), rank, RANKS) for s in LLAMA_70B)]
        case "FSDP1, fairscale FSDP":
            return [span for unit in UNITS for span in _flat(unit, rank)]
        case "ZeRO-1, ZeRO-2":
            return list(_flat(LLAMA_70B, rank))
    raise AssertionError(engine)


ENGINES = ("FSDP2", "DDP, ZeRO-3", "FSDP1, fairscale FSDP", "ZeRO-1, ZeRO-2")


def _flat(shapes: Sequence[Shape], rank: int) -> Iterator[tuple[int, int]]:
    """Yield the elements of each tensor in a rank's equal part of their concatenation."""
    sizes = [prod(shape) for shape in shapes]
    low, high = share(sum(sizes), rank, RANKS)
    for size, end in zip(sizes, accumulate(sizes), strict=True):
        start, stop = max(low, end - size), min(high, end)
        if start < stop:
            yield start - (end - size), stop - start


def count(owned: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """Return the launches of project and of combine for spans (start, elements)."""
    actual = [0, 0]
    for start, elements in owned:
        if elements:
            rows = Packed.empty(CANDIDATES, elements, start, BITS, torch.device("meta"))
            actual[0] += len(list(launches(rows, PROJECT[BITS].tiles))) + BESIDE
            actual[1] += len(list(launches(rows, COMBINE[BITS].tiles)))
    return actual[0], actual[1]


def table() -> Iterator[str]:
    """Yield the lines of a table of all engines."""
    parameters = sum(map(prod, LLAMA_70B))
    step = 6 * parameters * TOKENS / FLOPS
    yield "| engine | tensors of a rank | launches of project | of combine | gaps | of a step |"
    yield "| --- | ---: | ---: | ---: | ---: | ---: |"
    for engine in ENGINES:
        owned = spans(engine)
        project, combine = count(owned)
        gaps = GAP * (project + combine)
        numbers = f"{sum(1 for _, size in owned if size)} | {project:,} | {combine:,}"
        yield f"| {engine} | {numbers} | {1e3 * gaps:.1f} ms | {gaps / step:.2%} |"


if __name__ == "__main__":
    print("\n".join(table()))
