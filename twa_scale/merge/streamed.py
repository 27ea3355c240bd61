"""Averages computed from the candidates alone: read, combined and written by chunks, by all ranks at once."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import fsum, isclose
from pathlib import Path
from typing import Any

import torch

from twa_scale.comm import Group
from twa_scale.errors import CandidateError, OutputError
from twa_scale.kernels.checksum import checksum, wrap
from twa_scale.names import matches_any, nearest
from twa_scale.sources import Candidate
from twa_scale.spans import Span, whole
from twa_scale.writer import Files, TensorSpec, Writer, stored_as, writing
from twa_scale.writer.publish import check_apart

_CHUNK = 1 << 21  # elements: a reference, a sum and a summand in float32, and what was read, make 32 MiB

Checksums = list[dict[str, int]]
"""By candidate, then tensor: of every tensor that was read from it (see kernels.checksum)."""
Weights = Callable[[str], Sequence[float] | int]
"""Says for a tensor name the weights a_1..a_n of the candidates, or the index of the one to copy it from."""


def merge(
    candidates: Sequence[Candidate],
    out: str | Path,
    weights: Weights,
    group: Group,
    *,
    max_shard_size: str | int = "5GB",
    dtype: torch.dtype | None = None,
    ignore: Sequence[str] = (),
    replace: Mapping[str, torch.Tensor] | None = None,
    files: Files | None = None,
    overwrite: bool = False,
    progress: Callable[[int], None] | None = None,
    verify: Callable[[Checksums], None] | None = None,
) -> Checksums:
    """Write sum_i a_i w_i as safetensors, no tensor of which is ever whole in memory. Collective.

    Each chunk is read by one rank, and combined in float32 (float64 where a candidate has float64) as
    r + sum_i a_i (w_i - r) + (sum_i a_i - 1) r around the candidate r of the largest weight: where candidates
    agree, the result is theirs to the bit. Candidates of weight zero are not read. Tensors that are not
    floating point are copied from the last candidate.

    Args:
        candidates: known to be alike, as `open_candidates` returns them.
        out: directory to write, on a file system that all ranks share.
        weights: the weights of each tensor.
        group: ranks that share the work.
        max_shard_size: most bytes of tensor data in one file.
        dtype: type of every floating point tensor in the result; that of the last candidate when not given.
        ignore: regular expressions of tensor names to leave out.
        replace: values to write in place of tensors of the candidates; the same on every rank.
        files: small files to put beside the weights.
        overwrite: replace an earlier output.
        progress: called with the bytes that this rank has just read.
        verify: called on every rank with the checksums, before anything is published; it may raise.

    Raises:
        CandidateError: NaN or Inf, or a file that cannot be read.
        OutputError: see `writing`; or a result that is too large for `dtype`.
    """
    replace = replace or {}
    specs = [spec for spec in merged_specs(candidates, dtype) if not matches_any(spec.name, ignore)]
    with group.agree():
        _check_replace(specs, replace)
        check_apart(target=Path(out), inputs=[candidate.label for candidate in candidates])
    options: Any = {"max_shard_size": max_shard_size, "files": files, "overwrite": overwrite}
    with writing(out, specs, group, **options) as writer:
        merger = _Merger(candidates, weights, replace, {spec.name: spec for spec in specs}, writer, progress)
        with group.agree():
            for piece in _share(specs, group):
                merger.merge(piece)
        checksums = _total(group.gather(merger.checksums))
        if verify:
            verify(checksums)
    return checksums


def merged_specs(candidates: Sequence[Candidate], dtype: torch.dtype | None = None) -> list[TensorSpec]:
    """Return what `merge` writes: the last candidate's tensors, floating point ones as `dtype` if given."""
    last = candidates[-1]
    return [TensorSpec(name, last.shape(name), stored_as(last.dtype(name), dtype)) for name in last.names()]


def _check_replace(specs: Sequence[TensorSpec], replace: Mapping[str, torch.Tensor]) -> None:
    shapes = {spec.name: spec.shape for spec in specs}
    for name, value in replace.items():
        if shapes.get(name) != tuple(value.shape):
            raise CandidateError(
                f"replacement of tensor {name!r}: has shape {tuple(value.shape)}, the candidates have "
                f"{shapes.get(name, 'no such tensor')}{nearest(name, shapes) if name not in shapes else ''}."
            )


def _share(specs: Sequence[TensorSpec], group: Group) -> list[Span]:
    """Return this rank's equal part of the chunks, consecutive ones, so that files are read in order."""
    itemsize = {spec.name: spec.dtype.itemsize for spec in specs}
    total = sum(spec.nbytes for spec in specs)
    mine = []
    done = 0
    for _, piece in (cut for spec in specs for cut in whole(spec.name, spec.shape).pieces(_CHUNK)):
        if min(done * group.size // max(total, 1), group.size - 1) == group.rank:
            mine.append(piece)
        done += len(piece) * itemsize[piece.name]
    return mine


@dataclass
class _Merger:
    """Combines pieces of tensors, and keeps the checksums of what it reads."""

    candidates: Sequence[Candidate]
    weights: Weights
    replace: Mapping[str, torch.Tensor]
    specs: Mapping[str, TensorSpec]
    writer: Writer
    progress: Callable[[int], None] | None

    def __post_init__(self) -> None:
        self.checksums: Checksums = [{} for _ in self.candidates]

    def merge(self, piece: Span) -> None:
        """Read, combine and write one piece."""
        self.writer.write(piece, self._fitting(piece, self._values(piece)))

    def _values(self, piece: Span) -> torch.Tensor:
        if piece.name in self.replace:
            return self.replace[piece.name].reshape(-1)[piece.start : piece.stop]
        if not self.candidates[-1].dtype(piece.name).is_floating_point:
            return self._read(piece, len(self.candidates) - 1)
        a = self.weights(piece.name)
        return self._copy(piece, a) if isinstance(a, int) else self._combine(piece, a)

    def _copy(self, piece: Span, index: int) -> torch.Tensor:
        values = self._read(piece, index)
        self._refuse(piece, index, torch.isnan(values.float()))  # Inf may be meant, as in a mask
        return values

    def _combine(self, piece: Span, a: Sequence[float]) -> torch.Tensor:
        assert len(a) == len(self.candidates)
        wide = any(candidate.dtype(piece.name) == torch.float64 for candidate in self.candidates)
        compute = torch.float64 if wide else torch.float32
        first = max(range(len(a)), key=lambda i: abs(a[i]))
        reference = self._finite(piece, first, compute)
        total = fsum(a)
        # Weights of sum 1 that were rounded must not move float64 candidates that agree by a last bit.
        result = reference * (0.0 if isclose(total, 1, rel_tol=1e-12) else total - 1)
        for i, weight in enumerate(a):
            if i != first and weight != 0:
                result.add_(self._finite(piece, i, compute).sub_(reference), alpha=weight)
        return result.add_(reference)

    def _finite(self, piece: Span, index: int, compute: torch.dtype) -> torch.Tensor:
        values = self._read(piece, index).to(compute)
        if not torch.isfinite(values.sum()):  # cheap, but a sum can also overflow
            self._refuse(piece, index, ~torch.isfinite(values))
        return values

    def _read(self, piece: Span, index: int) -> torch.Tensor:
        candidate = self.candidates[index]
        values = torch.empty(len(piece), dtype=candidate.dtype(piece.name))
        candidate.read(piece.name, piece.start, values)
        sums = self.checksums[index]
        sums[piece.name] = wrap(sums.get(piece.name, 0) + checksum(values))
        if self.progress:
            self.progress(values.nbytes)
        return values

    def _refuse(self, piece: Span, index: int, bad: torch.Tensor) -> None:
        if bad.any():
            raise CandidateError(
                f"{self.candidates[index].label}: tensor {piece.name!r} holds NaN or Inf at element "
                f"{piece.start + int(bad.nonzero()[0])}; weights must be finite. Leave this candidate out."
            )

    def _fitting(self, piece: Span, values: torch.Tensor) -> torch.Tensor:
        dtype = self.specs[piece.name].dtype
        if dtype.is_floating_point and dtype.itemsize < values.itemsize and len(values):
            largest = values.abs().max().item()
            if torch.finfo(dtype).max < largest < float("inf"):
                raise OutputError(
                    f"tensor {piece.name!r}: holds {largest:g}, too large for {dtype}, which ends at "
                    f"{torch.finfo(dtype).max:g}. Choose a wider dtype."
                )
        return values


def _total(parts: Sequence[Checksums]) -> Checksums:
    total: Checksums = [{} for _ in parts[0]]
    for part in parts:
        for sums, more in zip(total, part, strict=True):
            for name, value in more.items():
                sums[name] = wrap(sums.get(name, 0) + value)
    return total
