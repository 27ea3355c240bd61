"""Averages computed from the candidates alone: read, combined and written by chunks, by all ranks at once."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from math import fsum, isclose
from pathlib import Path
from typing import Any

import torch

from twa_scale.errors import CandidateError
from twa_scale.kernels import Differences, Kernels, choose_kernels
from twa_scale.kernels.checksum import wrap
from twa_scale.names import matches_any, nearest
from twa_scale.ranks import Group
from twa_scale.reading import Job, Part, Progress, Reader, job_bytes
from twa_scale.sources import Candidate
from twa_scale.spans import Span, whole
from twa_scale.writer import Files, TensorSpec, Writer, stored_as, writing
from twa_scale.writer.publish import check_apart

_CHUNK = 1 << 21  # elements; what ranks share out

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
    progress: Progress | None = None,
    verify: Callable[[Checksums], None] | None = None,
) -> Checksums:
    """Write sum_i a_i w_i as safetensors, no tensor of which is ever whole in memory. Collective.

    Each chunk is read by one rank, and combined in float32 (float64 where a candidate has float64) as
    (sum_i a_i) r + sum_i a_i (w_i - r) around the candidate r of the largest weight: where candidates
    agree, the result is theirs to the bit. Candidates of weight zero are not read. Tensors that are not
    floating point are copied from the last candidate. A rank needs two buffers of a megabyte of each candidate
    (at most 64 MiB), and some megabytes for the result.

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
        progress: called with what this rank has read.
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
        kernels = choose_kernels("auto", torch.device("cpu"))
        merger = _Merger(candidates, cache(weights), replace, {spec.name: spec for spec in specs}, writer, kernels)
        with group.agree():
            merger.merge(_share(specs, group), progress)
        checksums = _total(group.gather(merger.checksums))
        if verify:
            verify(checksums)
    return checksums


def merged_specs(candidates: Sequence[Candidate], dtype: torch.dtype | None = None) -> list[TensorSpec]:
    """Return what `merge` writes: the last candidate's tensors, floating point ones as `dtype` if given."""
    last = candidates[-1]
    return [
        TensorSpec(name, last.shape(name), stored_as(last.dtype(name), dtype), last.stored_names[name])
        for name in last.names()
    ]


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
    kernels: Kernels

    def __post_init__(self) -> None:
        self.checksums: Checksums = [{} for _ in self.candidates]

    def merge(self, pieces: Iterable[Span], progress: Progress | None) -> None:
        """Read, combine and write pieces."""
        streamed: list[Job] = []
        for piece in pieces:
            if piece.name in self.replace:
                self.writer.write(piece, self.replace[piece.name].reshape(-1)[piece.start : piece.stop])
            else:
                streamed.append((piece, self._who(piece.name)))
        reader = Reader(self.candidates, job_bytes(self.candidates, streamed), progress)
        for part in reader.parts(streamed):
            sums = self.kernels.checksums(part.sources).tolist()
            for total, more in zip([self.checksums[i] for i in part.who], sums, strict=True):
                total[part.span.name] = wrap(total.get(part.span.name, 0) + more)
            copied = isinstance(self.weights(part.span.name), int)  # Inf may be meant, as in a mask
            self.writer.write(part.span.part(part.start, part.stop), self._values(part), masks=copied)

    def _who(self, name: str) -> list[int]:
        """Return the candidates that a tensor is made of."""
        if not self.candidates[-1].dtype(name).is_floating_point:
            return [len(self.candidates) - 1]
        a = self.weights(name)
        if isinstance(a, int):
            return [a]
        assert len(a) == len(self.candidates)
        return [i for i, weight in enumerate(a) if weight != 0] or [0]

    def _values(self, part: Part) -> torch.Tensor:
        name = part.span.name
        if not self.candidates[-1].dtype(name).is_floating_point:
            return part.sources[0]
        a = self.weights(name)
        if isinstance(a, int):
            self._refuse(part, torch.isnan)
            return part.sources[0]
        values = self._combine(part, a)
        if not torch.isfinite(values.sum()):  # cheap, but finite numbers can have a sum that is too large
            self._refuse(part, lambda source: ~torch.isfinite(source))
        return values

    def _combine(self, part: Part, a: Sequence[float]) -> torch.Tensor:
        total = fsum(a)
        # Weights of sum 1 that were rounded must not move float64 candidates that agree by a last bit.
        scale = 1.0 if isclose(total, 1, rel_tol=1e-12) else total
        sources = list(zip([a[i] for i in part.who], part.sources, strict=True))
        _, first = sources.pop(max(range(len(sources)), key=lambda i: abs(sources[i][0])))
        wide = any(candidate.dtype(part.span.name) == torch.float64 for candidate in self.candidates)
        reference = first.to(torch.float64 if wide else torch.float32)
        if wide or not sources:
            result: torch.Tensor = reference * scale
            for weight, source in sources:
                result.add_(source.to(result.dtype) - reference, alpha=weight)
            return result
        weights, rows = torch.tensor([weight for weight, _ in sources]), [_plain(source) for _, source in sources]
        combined = torch.empty_like(reference)
        self.kernels.combine(Differences(rows, reference), weights, reference, scale, combined)
        return combined

    def _refuse(self, part: Part, wrong: Callable[[torch.Tensor], torch.Tensor]) -> None:
        for i, source in zip(part.who, part.sources, strict=True):
            bad = wrong(source.double())
            if bad.any():
                raise CandidateError(
                    f"{self.candidates[i].label}: tensor {part.span.name!r} holds NaN or Inf at element "
                    f"{part.element(int(bad.nonzero()[0]))}; weights must be finite. Leave this candidate out."
                )


def _plain(source: torch.Tensor) -> torch.Tensor:
    """Widen once what kernels would widen piece by piece."""
    return source if source.dtype in (torch.float32, torch.bfloat16) else source.float()


def _total(parts: Sequence[Checksums]) -> Checksums:
    total: Checksums = [{} for _ in parts[0]]
    for part in parts:
        for sums, more in zip(total, part, strict=True):
            for name, value in more.items():
                sums[name] = wrap(sums.get(name, 0) + value)
    return total
