"""What a run exported, against sum_i a_i w_i formed anew in float64 from the files, by safetensors' own reader.

The two differ by the rounding of the store and of the file. What both have to be is known: deltas that the store keeps
with a cosine of cos_i leave errors of norm sqrt(1 - cos_i^2) |delta_i|, which add up like independent numbers,

    |exported - merged|^2 = sum_i u_i^2 (1 - cos_i^2) |delta_i|^2 + |rounding to bfloat16|^2.

Candidates that share a file have the same error in its tensors. There the sum runs over the files, and u_i is the sum
of the weights of the candidates that share file i. Few files have dependent errors: the deltas of two to their mean are
opposite.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from twa_scale.average.state import AverageState, load_state
from twa_scale.kernels.packed_rows import BLOCKS, zero_of
from twa_scale.kernels.torch.quantize import quantize

PIECE = 1 << 17  # elements of each candidate that are in memory at a time


class Checkpoint:
    """Tensors of a directory, by rows."""

    def __init__(self, directory: Path, stack: ExitStack) -> None:
        self.slices = {}
        self.file_of = {}
        """The number of the file that holds a tensor, which is that of all its hard links."""
        for path in sorted(directory.glob("*.safetensors")):
            file = stack.enter_context(safe_open(path, "pt"))
            for name in file.keys():  # noqa: SIM118 (no dict)
                self.slices[name], self.file_of[name] = file.get_slice(name), path.stat().st_ino

    def read(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Return rows [start, stop) as float64, flat."""
        rows: torch.Tensor = self.slices[name][start:stop]
        return rows.double().view(-1)


@dataclass
class Squares:
    """Squared norms of one tensor."""

    group: int
    deltas: torch.Tensor
    lost: torch.Tensor
    """(n,): 1 - cos_i^2 of the first elements."""
    owners: torch.Tensor
    """(n,): for each candidate the first one that has the same file."""
    center: float = 0.0
    moved: float = 0.0
    """merged - center."""
    error: float = 0.0
    """exported - merged."""
    exact: float = 0.0
    """What `twa-scale export` wrote - merged."""
    rounding: float = 0.0
    """merged, rounded to bfloat16 - merged."""

    def predicted(self, u: torch.Tensor) -> float:
        """Return what `error` should be for the weights u (n,) of the deltas."""
        of_files = torch.zeros_like(u).index_add_(0, self.owners, u)
        return float((of_files.square() * self.lost * self.deltas).sum()) + self.rounding


def check(candidates: Sequence[Path], run: Path, exact: Path, bits: int) -> dict[str, Any]:
    """Compare the export of a run, and the merge `exact` of `twa-scale export`, with the merge formed here."""
    state = load_state(run).exported
    with ExitStack() as stack:
        read = [Checkpoint(path, stack) for path in (*candidates, run / "average", exact)]
        totals = {name: squares(name, read, state, bits) for name in read[0].slices}
    weights = delta_weights(state.x, totals)
    total = {
        key: sqrt(sum(getattr(s, key) for s in totals.values()))
        for key in ("center", "moved", "error", "exact", "rounding")
    }
    total["predicted"] = sqrt(sum(s.predicted(weights[s.group]) for s in totals.values()))
    ratios = {name: sqrt(s.error / s.predicted(weights[s.group])) for name, s in totals.items()}
    merges = [sqrt(s.exact / s.rounding) for s in totals.values()]
    return {
        "moved": total["moved"] / total["center"],
        "error": total["error"] / total["moved"],
        "predicted": total["predicted"] / total["moved"],
        "rounding": total["rounding"] / total["moved"],
        "cosine": float((1 - torch.stack([s.lost for s in totals.values()])).sqrt().mean()),
        "tensors": [min(ratios.values()), max(ratios.values())],
        "exact": [min(merges), max(merges)],
    }


def squares(name: str, read: Sequence[Checkpoint], state: AverageState, bits: int) -> Squares:
    """Read one tensor of the candidates, the export and the exact merge, once."""
    group = state.group_of[name]
    a = state.coefficients[:, group]
    files = [checkpoint.file_of[name] for checkpoint in read[: len(a)]]
    owners = torch.tensor([files.index(file) for file in files])
    result = None
    for *rows, exported, exact in pieces(name, read):
        w = torch.stack(rows)
        center, merged = w.mean(0), a @ w
        deltas = w.sub_(center)
        result = result or Squares(group, torch.zeros(len(a), dtype=torch.float64), lost(deltas, bits), owners)
        result.deltas += deltas.square().sum(1)
        for key, difference in {
            "center": center,
            "moved": merged - center,
            "error": exported - merged,
            "exact": exact - merged,
            "rounding": merged.bfloat16().double() - merged,
        }.items():
            setattr(result, key, getattr(result, key) + float(difference.square().sum()))
    assert result is not None
    return result


def pieces(name: str, read: Sequence[Checkpoint]) -> Iterator[list[torch.Tensor]]:
    """Yield rows of one tensor of all checkpoints, piece by piece."""
    rows, *inner = read[0].slices[name].get_shape()
    step = max(1, PIECE // torch.Size(inner).numel())
    for start in range(0, rows, step):
        yield [checkpoint.read(name, start, min(start + step, rows)) for checkpoint in read]


def lost(deltas: torch.Tensor, bits: int) -> torch.Tensor:
    """Return 1 - cos^2 of deltas (n, m), which begin a tensor, and what `bits` make of their first whole blocks."""
    block = BLOCKS[bits]
    rows = deltas[:, : deltas.shape[1] // block * block].float()
    codes, scales = quantize(rows, 0, 0, block, bits)
    kept = ((codes - zero_of(bits)) * scales.float()[..., None]).flatten(1)
    return 1 - torch.cosine_similarity(rows.double(), kept.double()).square()


def delta_weights(x: torch.Tensor, totals: dict[str, Squares]) -> torch.Tensor:
    """Return u (G, n) of coefficients x (n, G): basis `normalized`, `units: delta`."""
    norms = torch.zeros(x.T.shape, dtype=torch.float64)
    for s in totals.values():
        norms[s.group] += s.deltas
    norms.sqrt_()
    return x.T * norms.mean(1, keepdim=True) / norms
