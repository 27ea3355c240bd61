"""Averages computed from the candidates alone: read, combined and written by chunks, by all ranks at once."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from math import fsum, isclose
from pathlib import Path
from typing import Any

import torch

from twa_scale.base.names import matches_any, nearest
from twa_scale.base.notices import notice
from twa_scale.base.spans import Span, whole
from twa_scale.candidates import Candidate
from twa_scale.candidates.adapters import summed
from twa_scale.candidates.buffers import Source, copied_notice
from twa_scale.candidates.carry_over import Carried
from twa_scale.candidates.dtypes import types_notice
from twa_scale.candidates.read_ahead import Job, Part, Progress, Reader, job_bytes, same_values, sum_of
from twa_scale.errors import CandidateError
from twa_scale.kernels import Kernels, Target, choose_kernels
from twa_scale.kernels.torch.checksum import wrap
from twa_scale.kernels.torch.deltas import reference_of
from twa_scale.output import Writer, writing
from twa_scale.output.provenance import provenance, writing_options
from twa_scale.output.publish import check_inputs_outside
from twa_scale.output.stored_form import StoredForm, form_of_candidates
from twa_scale.ranks import Group

_CHUNK = 1 << 21  # elements; what ranks share out

Checksums = list[dict[str, int]]
"""By candidate, then tensor: of every tensor that was read from it (see kernels.checksum)."""
Weights = Callable[[str], Source]
"""Says for a tensor name the weights a_1..a_n of the candidates, or the index of the one to copy it from."""


def merge(
    candidates: Sequence[Candidate],
    out: str | Path,
    weights: Weights,
    group: Group,
    *,
    carried: Carried | None = None,
    origin: Mapping[str, Any] | None = None,
    max_shard_size: str | int = "5GB",
    dtype: torch.dtype | None = None,
    ignore: Sequence[str] = (),
    replace: Mapping[str, torch.Tensor] | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
    verify: Callable[[Checksums], None] | None = None,
    units: Mapping[str, str] | None = None,
) -> Checksums:
    """Write sum_i a_i w_i as safetensors, no tensor of which is ever whole in memory. Collective.

    Each chunk is read by one rank, and combined in float32 (float64 where a candidate has float64) as
    r + sum_i a_i (w_i - r) + (sum_i a_i - 1) r around the candidate r of the largest weight: where candidates
    agree, the result is theirs to the bit, and with weights of sum 1 it has the bits of the center that `attach` makes
    on a CPU. Candidates of weight zero are not read. Tensors that are not floating point are copied from the last
    candidate; what is copied is read from all, and reported where they differ. A rank needs two buffers of a megabyte
    of each candidate (at most 64 MiB), and some megabytes for the result.

    Args:
        candidates: known to be alike, as `open_candidates` returns them.
        out: directory to write, on a file system that all ranks share.
        weights: the weights of each tensor.
        group: ranks that share the work.
        carried: what the result takes over from the candidates; the small files are those of the first rank.
        origin: where the result comes from (`provenance`), beside the candidates.
        max_shard_size: most bytes of tensor data in one file; see `Carried.shard_size`.
        dtype: type of every floating point tensor in the result; when not given, the widest of the candidates, which
            is reported where they differ.
        ignore: regular expressions of tensor names to leave out.
        replace: values to write in place of tensors of the candidates; the same on every rank.
        overwrite: replace an earlier output.
        progress: called with what this rank has read.
        verify: called on every rank with the checksums, before anything is published; it may raise.
        units: by tensor: tensors of one unit are written by one rank, which computes them together.

    Raises:
        CandidateError: NaN or Inf, or a file that cannot be read.
        OutputError: see `writing`; or a result that is too large for `dtype`.
    """
    replace = replace or {}
    names = [name for name in candidates[-1].names() if not matches_any(name, ignore)]
    form = form_of_candidates(candidates, names, dtype)
    tensors = [whole(name, candidates[-1].shape(name)) for name in names]
    with group.agree():
        _check_replace({name: candidates[-1].shape(name) for name in names}, replace)
        check_inputs_outside(out, [candidate.label for candidate in candidates])
    origin = origin or provenance("a weighted sum", [candidate.label for candidate in candidates])
    options = writing_options(carried or Carried(), origin, dtype, max_shard_size)
    with writing(out, form.specs, group, overwrite=overwrite, **options) as writer:
        kernels = choose_kernels("auto", torch.device("cpu"))
        merger = _Merger(candidates, cache(weights), replace, form, writer, kernels)
        with group.agree():
            merger.merge(_share(tensors, form, group, units or {}), progress)
        checksums = _total(group.gather(merger.checksums))
        copied = {name: i for found in group.gather(merger.differing) for name, i in found.items()}
        if verify:
            verify(checksums)
    if group.rank == 0:
        if copied:
            notice(copied_notice(copied, [candidate.label for candidate in candidates]))
        if dtype is None and (text := types_notice(candidates, names)):
            notice(text)
    return checksums


def _check_replace(shapes: Mapping[str, tuple[int, ...]], replace: Mapping[str, torch.Tensor]) -> None:
    for name, value in replace.items():
        if shapes.get(name) != tuple(value.shape):
            raise CandidateError(
                f"replacement of tensor {name!r}: has shape {tuple(value.shape)}, the candidates have "
                f"{shapes.get(name, 'no such tensor')}{(name not in shapes and nearest(name, shapes)) or '.'}"
            )


def _share(tensors: Sequence[Span], form: StoredForm, group: Group, units: Mapping[str, str]) -> list[Span]:
    """Return this rank's equal part of the chunks, consecutive ones, so that files are read in order."""
    total = sum(map(form.nbytes, tensors))
    mine = []
    done = 0
    rank_of: dict[str, int] = {}  # of units
    for _, piece in (cut for tensor in tensors for cut in tensor.pieces(_CHUNK)):
        rank = min(done * group.size // max(total, 1), group.size - 1)
        if piece.name in units:
            rank = rank_of.setdefault(units[piece.name], rank)
        if rank == group.rank:
            mine.append(piece)
        done += form.nbytes(piece)
    return mine


@dataclass
class _Merger:
    """Combines pieces of tensors, and keeps the checksums of what it reads."""

    candidates: Sequence[Candidate]
    weights: Weights
    replace: Mapping[str, torch.Tensor]
    form: StoredForm
    writer: Writer
    kernels: Kernels

    def __post_init__(self) -> None:
        self.summed = summed(self.candidates[-1])
        self.checksums: Checksums = [{} for _ in self.candidates]
        self.differing: dict[str, int] = {}

    def merge(self, pieces: Iterable[Span], progress: Progress | None) -> None:
        """Read, combine and write pieces."""
        streamed: list[Job] = []
        for piece in pieces:
            if piece.name in self.replace:
                self._write(piece, self.replace[piece.name].reshape(-1)[piece.start : piece.stop])
            else:
                streamed.append((piece, self._who(piece.name)))
        reader = Reader(self.candidates, job_bytes(self.candidates, streamed), progress)
        for part in reader.parts(streamed):
            source = self._source(part.span.name)
            if part.span.name in self.summed:
                values, masks = self._summed(part), False
            elif isinstance(source, int):
                values, masks = self._copied(part, source), True
            else:
                values, masks = self._combined(part, source)
            self._write(part.span.part(part.start, part.stop), values, allow_infinite=masks)

    def _write(self, span: Span, values: torch.Tensor, *, allow_infinite: bool = False) -> None:
        for stored, part in self.form.spans(span, values):
            self.writer.write(stored, part, allow_infinite=allow_infinite)

    def _source(self, name: str) -> Source:
        if not self.candidates[-1].dtype(name).is_floating_point:
            return len(self.candidates) - 1
        return self.weights(name)

    def _who(self, name: str) -> list[int]:
        """Return the candidates that are read: those that have a weight, or all of what is copied."""
        a = self._source(name)
        if isinstance(a, int) or name in self.summed:
            return list(range(len(self.candidates)))
        assert len(a) == len(self.candidates)
        return [i for i, weight in enumerate(a) if weight != 0] or [0]

    def _copied(self, part: Part, which: int) -> torch.Tensor:
        self._add(part, self.kernels.checksums(part.sources))
        chosen = part.sources[which]
        if not all(same_values(chosen, source) for source in part.sources):
            self.differing[part.span.name] = which
        if chosen.is_floating_point() and bool((nan := torch.isnan(chosen)).any()):
            raise self._bad(part, which, nan)
        return chosen

    def _summed(self, part: Part) -> torch.Tensor:
        """Return the sum of all candidates; each element is zero in all but one."""
        self._add(part, self.kernels.checksums(part.sources))
        for i, source in enumerate(part.sources):
            if (wrong := ~torch.isfinite(source)).any():
                raise self._bad(part, i, wrong)
        return sum_of(part.sources)

    def _combined(self, part: Part, weights: Sequence[float]) -> tuple[torch.Tensor, bool]:
        """Return the average, and whether it holds infinite numbers that all candidates share, as in a mask."""
        a = [weights[i] for i in part.who]
        wide = any(source.dtype == torch.float64 for source in part.sources)
        result = torch.empty(len(part.sources[0]), dtype=torch.float64 if wide else torch.float32)
        seen = self.kernels.make_deltas(part.sources, a, Target(center=result), 0)
        self._add(part, seen.checksums)
        mask, finite = None, part
        if not seen.finite:
            mask = part.mask()
            if mask is None:
                raise self._blamed(part)
            finite = part.without(mask)
            if not self.kernels.make_deltas(finite.sources, a, Target(center=result), 0).finite:
                raise self._blamed(part)
        total = fsum(a)
        # Weights of sum 1 that were rounded must not move float64 candidates that agree by a last bit.
        if not isclose(total, 1, rel_tol=1e-12):
            result.add_(finite.sources[reference_of(a)].to(result.dtype), alpha=total - 1)
        if mask is None or not torch.isfinite(result).all():
            return result, False
        result[mask] = part.sources[0][mask].to(result.dtype)
        return result, True

    def _add(self, part: Part, checksums: torch.Tensor) -> None:
        for total, more in zip([self.checksums[i] for i in part.who], checksums.tolist(), strict=True):
            total[part.span.name] = wrap(total.get(part.span.name, 0) + more)

    def _blamed(self, part: Part) -> CandidateError:
        for i, source in enumerate(part.sources):
            wrong = ~torch.isfinite(source.double())
            if wrong.any():
                return self._bad(part, i, wrong)
        return CandidateError(
            f"tensor {part.span.name!r}: from element {part.element(0)} on, candidates differ by more than their type "
            "can hold. Leave out those that have diverged, or choose smaller weights."
        )

    def _bad(self, part: Part, i: int, wrong: torch.Tensor) -> CandidateError:
        at = int(wrong.nonzero()[0, 0])
        return CandidateError(
            f"{self.candidates[part.who[i]].label}: tensor {part.span.name!r} holds NaN or Inf at element "
            f"{part.element(at)}; weights must be finite. Leave this candidate out."
        )


def _total(parts: Sequence[Checksums]) -> Checksums:
    total: Checksums = [{} for _ in parts[0]]
    for part in parts:
        for sums, more in zip(total, part, strict=True):
            for name, value in more.items():
                sums[name] = wrap(sums.get(name, 0) + value)
    return total
