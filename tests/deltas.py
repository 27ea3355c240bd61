"""Rows and stores with the deltas of candidates, made as `attach` makes them."""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from twa_scale.base.spans import Span
from twa_scale.kernels import Dense, Kernels, Packed, Target
from twa_scale.kernels.torch.reference import unpack
from twa_scale.store import Store

CPU = torch.device("cpu")


def fill(store: Store, span: Span, candidates: Tensor, cuts: Sequence[int] = ()) -> None:
    """Fill the store with candidates (n, m) around their mean, given in parts that end at `cuts`."""
    target, n = store.reserve(span), len(candidates)
    for low, high in pairwise([0, *cuts, len(span)]):
        part = candidates[:, low:high].clone()
        store.kernels.make_deltas(part, [1 / n] * n, target, low)
        part.fill_(torch.nan)  # the caller reuses its memory


def packed(values: Tensor, bits: int, kernels: Kernels, start: int = 0, device: torch.device = CPU) -> Packed:
    """Return the codes of deltas (n, m): those of n candidates around one of zeros, whose row is omitted."""
    n, m = values.shape
    rows = Packed.empty(n + 1, m, start, bits, device)
    kernels.make_deltas(torch.cat([values, torch.zeros(1, m)]), [0.0] * n + [1.0], Target(rows=rows), 0)
    tiles = list(rows.tiles(0, rows.count))
    words = torch.cat([rows.words[:0], *(part[:, :n].flatten() for _, part, _ in tiles)])
    scales = torch.cat([rows.scales[:0], *(part[:, :n].flatten() for _, _, part in tiles)])
    return Packed(words, scales, n, m, rows.lead, bits)


def packed_rows(rows: Packed) -> Tensor:
    """Return packed rows as (n, m)."""
    tiles = [unpack(words, scales, rows.bits) for _, words, scales in rows.tiles(0, rows.count)]
    columns = torch.cat([torch.empty(rows.n, 0), *(tile.transpose(0, 1).flatten(1) for tile in tiles)], 1)
    return columns[:, rows.lead : rows.lead + rows.m]


def matrix(rows: Dense) -> Tensor:
    """Return dense rows as (n, m)."""
    tiles = [part.transpose(0, 1).flatten(1) for _, part in rows.tiles(0, rows.count)]
    return torch.cat([rows.values.new_empty(rows.n, 0), *tiles], 1)
