"""Rows of a store with random content, created on the device, and their values in float64."""

from collections.abc import Callable

import torch
from torch import Tensor

from tests.deltas import matrix
from twa_scale.kernels import Dense, Packed
from twa_scale.kernels.torch.reference import unpack

STORES = ("packed4", "packed8", "dense16", "dense32", "packed2", "packed1")
_DTYPES = {"dense32": torch.float32, "dense16": torch.bfloat16}
_DRAWN = (1 << 20) - 3  # elements; odd, so that all tiles of a kernel differ


def random_rows(store: str, n: int, m: int, device: torch.device, start: int = 0) -> Dense | Packed:
    """Return n rows of m elements, the first of which is element `start` of a tensor."""
    if store in _DTYPES:
        rows: Dense | Packed = Dense.empty(n, m, _DTYPES[store], device)
    else:
        rows = Packed.empty(n, m, start, int(store.removeprefix("packed")), device)
    randomize(rows)
    return rows


def randomize(rows: Dense | Packed) -> None:
    """Fill packed rows with random bits and scales, and dense rows with normal numbers."""
    if isinstance(rows, Dense):
        repeat(rows.values, Tensor.normal_)
        return
    repeat(rows.words, lambda part: part.random_(-(1 << 15), 1 << 15))
    repeat(rows.scales, lambda part: part.uniform_(0.5, 1.5))


def repeat(tensor: Tensor, draw: Callable[[Tensor], object]) -> None:
    """Draw a part of a vector and repeat it, because a CPU takes minutes to draw what a GPU draws in a second."""
    done = min(_DRAWN, len(tensor))
    draw(tensor[:done])
    while done < len(tensor):
        more = min(done, len(tensor) - done)
        tensor[done : done + more].copy_(tensor[:more])
        done += more


def exact(rows: Dense | Packed) -> Tensor:
    """Return the rows as (n, m), float64."""
    if isinstance(rows, Dense):
        return matrix(rows).double()
    parts = [
        unpack(words, scales, rows.bits).double().transpose(0, 1).flatten(1)
        for _, words, scales in rows.tiles(0, rows.count)
    ]
    return torch.cat(parts, 1)[:, rows.lead : rows.lead + rows.m]
