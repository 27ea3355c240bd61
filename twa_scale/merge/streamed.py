"""Streamed merges: all ranks read, combine and write chunks of the candidates at the same time."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from math import fsum, isclose, prod
from pathlib import Path
from typing import Any

import torch

from twa_scale.base.names import matches_any, nearest
from twa_scale.base.notices import ignore_notice, notice
from twa_scale.base.spans import Span, whole_tensor
from twa_scale.candidates import Candidate
from twa_scale.candidates.adapters import summed
from twa_scale.candidates.buffers import Source, copied_notice
from twa_scale.candidates.carry_over import CarriedFiles
from twa_scale.candidates.dtypes import types_notice
from twa_scale.candidates.part import Part
from twa_scale.candidates.read_ahead import Job, Progress, Reader, job_bytes
from twa_scale.errors import CandidateError
from twa_scale.kernels import Kernels, Segments, Target, choose_kernels
from twa_scale.kernels.torch.checksum import wrap
from twa_scale.kernels.torch.deltas import reference_of
from twa_scale.merge.combination import Combination, PartWeights
from twa_scale.output import Writer, writing
from twa_scale.output.formats.choose import output_format
from twa_scale.output.options import OutputOptions
from twa_scale.output.provenance import provenance, writing_options
from twa_scale.output.publish import check_inputs_outside
from twa_scale.output.stored_form import StoredForm, form_of_candidates
from twa_scale.ranks import Group

_DEFAULT = OutputOptions()
_CHUNK = 1 << 21  # elements; the unit of work that is distributed over ranks

Checksums = list[dict[str, int]]
"""For each candidate, the checksum of every tensor that was read from it, by name (see kernels.checksum)."""


def merge(
    candidates: Sequence[Candidate],
    out: str | Path,
    combination: Combination,
    group: Group,
    *,
    output: OutputOptions = _DEFAULT,
    carried: CarriedFiles | None = None,
    origin: Mapping[str, Any] | None = None,
    ignore: Sequence[str] = (),
    progress: Progress | None = None,
    verify: Callable[[Checksums], None] | None = None,
) -> Checksums:
    """Write sum_i a_i w_i in a format, in chunks, so that no rank holds a whole tensor. Collective.

    Each chunk is read by one rank and combined in float32 (float64 if a candidate has float64) as r + sum_i a_i (w_i -
    r) + (sum_i a_i - 1) r, where r is the candidate of the largest weight. Elements that are equal in all candidates
    therefore keep their bits, and with weights that sum to 1 the result has the same bits as the center that `attach`
    computes on a CPU. For tensors with weights of rows, r is the first candidate. Candidates of weight zero are not
    read. Tensors that are not floating point are copied from the last candidate. Copied tensors are read from all
    candidates, and differences are reported. A rank needs two buffers of 1 MB for each candidate (at most 64 MiB), and
    some megabytes for the result.

    Args:
        candidates: compatible candidates, as `open_candidates` returns them.
        out: the directory to write, on a file system that all ranks share.
        combination: the weights of each tensor.
        group: the ranks that share the work.
        output: dtype, format and sizes of the files.
        carried: the properties of the candidates that the result keeps. The small files of the first rank are used.
        origin: the provenance of the result (`provenance`); by default, only the candidates.
        ignore: regular expressions of tensor names to leave out.
        progress: called with the number of bytes that this rank has read.
        verify: called on every rank with the checksums before the output is published. It may raise.

    Returns:
        The checksums of all tensors that were read, on every rank.

    Raises:
        CandidateError: a candidate holds NaN or Inf, or cannot be read.
        OutputError: see `writing`; or the result is too large for `dtype`.
    """
    names = [name for name in candidates[-1].names() if not matches_any(name, ignore)]
    carried = carried or CarriedFiles()
    with group.agree():
        chosen = output_format(output.form, candidates, carried, notice if group.rank == 0 else ignore_notice)
    stored = form_of_candidates(candidates[-1:] if chosen.keeps_dtypes else candidates, names, output.dtype)
    tensors = [whole_tensor(name, candidates[-1].shape(name)) for name in names]
    with group.agree():
        _check_replace({name: candidates[-1].shape(name) for name in names}, combination.values)
        check_inputs_outside(out, [candidate.label for candidate in candidates])
    origin = origin or provenance("a weighted sum", [candidate.label for candidate in candidates])
    options = writing_options(carried, origin, output, chosen)
    with writing(out, stored.specs, group, **options) as writer:
        kernels = choose_kernels("auto", torch.device("cpu"))
        merger = _Merger(candidates, combination, stored, writer, kernels)
        with group.agree():
            merger.require_one_sum(writer.shared)
            merger.merge(_share(_divide(tensors, combination.part_weights), stored, group, combination.units), progress)
        checksums = _total(group.gather(merger.checksums))
        _require_equal(candidates, writer.shared, checksums)
        copied = {name: i for differing in group.gather(merger.differing) for name, i in differing.items()}
        if verify:
            verify(checksums)
    if group.rank == 0:
        if text := copied_notice(copied, [candidate.label for candidate in candidates]):
            notice(text)
        if output.dtype is None and (text := types_notice(candidates, names, of_last=chosen.keeps_dtypes)):
            notice(text)
    return checksums


def _require_equal(candidates: Sequence[Candidate], shared: Sequence[tuple[str, str]], checksums: Checksums) -> None:
    """Check that tensors which have one place in the files of the last candidate are equal in all candidates.

    Args:
        candidates: the candidates.
        shared: pairs of names in the files.
        checksums: the checksums of the tensors that were read, by their names without wrappers.
    """
    names = {stored: name for name, stored in candidates[-1].stored_names.items()}
    for first, second in ((names.get(a, a), names.get(b, b)) for a, b in shared):
        for candidate, sums in zip(candidates, checksums, strict=True):
            if sums.get(first) != sums.get(second):
                raise CandidateError(
                    f"{candidate.label}: tensors {first!r} and {second!r} hold different values, but are one tensor in "
                    f"the files of {candidates[-1].label}, which --format same (format='same') keeps. Choose hf, dcp "
                    "or pt, or leave this candidate out."
                )


def _check_replace(shapes: Mapping[str, tuple[int, ...]], replace: Mapping[str, torch.Tensor]) -> None:
    for name, value in replace.items():
        if shapes.get(name) != tuple(value.shape):
            raise CandidateError(
                f"replacement of tensor {name!r}: has shape {tuple(value.shape)}, the candidates have "
                f"{shapes.get(name, 'no such tensor')}{(name not in shapes and nearest(name, shapes)) or '.'}"
            )


def _divide(tensors: Sequence[Span], parts: PartWeights) -> list[Span]:
    """Return the tensors, divided into parts if these have their own weights."""
    pieces = []
    for tensor in tensors:
        count = len(parts.get(tensor.name, ())) or 1
        pieces += [span for _, span in tensor.split(max(1, len(tensor) // count))]
    return pieces


def _share(tensors: Sequence[Span], form: StoredForm, group: Group, units: Mapping[str, str]) -> list[Span]:
    """Return this rank's part of the chunks. Parts are equal and consecutive, so that files are read in order."""
    total = sum(map(form.nbytes, tensors))
    pieces = []
    done = 0
    rank_of: dict[str, int] = {}  # the rank of each unit
    for _, piece in (part for tensor in tensors for part in tensor.pieces(_CHUNK)):
        rank = min(done * group.size // max(total, 1), group.size - 1)
        if piece.name in units:
            rank = rank_of.setdefault(units[piece.name], rank)
        if rank == group.rank:
            pieces.append(piece)
        done += form.nbytes(piece)
    return pieces


@dataclass
class _Merger:
    """Combines pieces of tensors, and accumulates the checksums of the data that it reads."""

    candidates: Sequence[Candidate]
    combination: Combination
    form: StoredForm
    writer: Writer
    kernels: Kernels

    def __post_init__(self) -> None:
        self.summed = summed(self.candidates[-1])
        self.weights = cache(self.combination.weights)
        self.row_weights = self.combination.row_weights
        self.values = self.combination.values
        self.checksums: Checksums = [{} for _ in self.candidates]
        self.differing: dict[str, int] = {}
        # The last result is enough, because the parts of a tensor are consecutive.
        self.of_rows = lru_cache(1)(lambda name: self.row_weights[name]())

    def merge(self, pieces: Iterable[Span], progress: Progress | None) -> None:
        """Read, combine and write the pieces."""
        streamed: list[Job] = []
        for piece in pieces:
            if piece.name in self.values:
                self._write(piece, self.values[piece.name].reshape(-1)[piece.start : piece.stop])
            else:
                streamed.append((piece, self._read_from(piece.name)))
        reader = Reader(self.candidates, job_bytes(self.candidates, streamed), progress)
        for part in reader.parts(streamed):
            source = self._source(part.span)
            if part.span.name in self.summed:
                values, masks = self._summed(part), False
            elif isinstance(source, int):
                values, masks = self._copied(part, source), True
            elif part.span.name in self.row_weights:
                values, masks = self._combined_by_row(part, self.of_rows(part.span.name)), False
            else:
                values, masks = self._combined(part, source)
            self._write(part.span.part(part.start, part.stop), values, allow_infinite=masks)

    def require_one_sum(self, shared: Sequence[tuple[str, str]]) -> None:
        """Check that tensors which have one place in the files of the last candidate get the same weights.

        Args:
            shared: pairs of names in the files.

        Raises:
            CandidateError: two tensors have different weights.
        """
        names = {stored: name for name, stored in self.candidates[-1].stored_names.items()}
        for first, second in shared:
            if not (first in names and second in names and self._have_equal_factors(names[first], names[second])):
                raise CandidateError(
                    f"tensors {first!r} and {second!r} are one tensor in the files of {self.candidates[-1].label}, "
                    "which --format same (format='same') keeps, but have different coefficients. Choose hf, dcp or "
                    "pt, or put both into one group."
                )

    def _have_equal_factors(self, first: str, second: str) -> bool:
        """Return whether two tensors are written with the same weights, weights of rows, or replacement."""
        for factors in (
            self.values,
            {name: make() for name in (first, second) if (make := self.row_weights.get(name))},
        ):
            if (first in factors) != (second in factors):
                return False
            if first in factors and not torch.equal(factors[first], factors[second]):
                return False
        return self._sources(first) == self._sources(second)

    def _write(self, span: Span, values: torch.Tensor, *, allow_infinite: bool = False) -> None:
        for stored, part in self.form.spans(span, values):
            self.writer.write(stored, part, allow_infinite=allow_infinite)

    def _source(self, span: Span) -> Source:
        """Return the weights of the part of a tensor that contains a span."""
        sources = self._sources(span.name)
        if len(sources) == 1:
            return sources[0]
        return sources[span.start * len(sources) // prod(self.candidates[-1].shape(span.name))]

    def _sources(self, name: str) -> Sequence[Source]:
        """Return the weights of the equal parts of a tensor. There is one part, unless parts have their own weights."""
        if not self.candidates[-1].dtype(name).is_floating_point:
            return [len(self.candidates) - 1]
        return self.combination.part_weights.get(name) or [self.weights(name)]

    def _read_from(self, name: str) -> list[int]:
        """Return the indices of the candidates to read: those of nonzero weight, or all for a copied tensor."""
        sources = self._sources(name)  # the whole tensor is read, because checksums are of whole tensors
        everyone = list(range(len(self.candidates)))
        if name in self.summed or name in self.row_weights:
            return everyone
        used: set[int] = set()
        for a in sources:
            if isinstance(a, int):
                return everyone
            assert len(a) == len(self.candidates)
            used |= {i for i in everyone if a[i] != 0}
        return sorted(used) or [0]

    def _copied(self, part: Part, which: int) -> torch.Tensor:
        self._add(part, self.kernels.checksums(part.sources))
        chosen, is_same_in_all = part.copied(which)
        if not is_same_in_all:
            self.differing[part.span.name] = which
        return chosen

    def _summed(self, part: Part) -> torch.Tensor:
        self._add(part, self.kernels.checksums(part.sources))
        return part.total()

    def _combined(self, part: Part, weights: Sequence[float]) -> tuple[torch.Tensor, bool]:
        """Return the average, and whether it has infinite elements that all candidates share, as masks have."""
        a = [weights[i] for i in part.indices]
        wide = any(source.dtype == torch.float64 for source in part.sources)
        result = torch.empty(len(part.sources[0]), dtype=torch.float64 if wide else torch.float32)
        checks = self.kernels.make_deltas(part.sources, a, Target(center=result), 0)
        self._add(part, checks.checksums)
        mask, finite = None, part
        if not checks.finite:
            mask = part.mask()
            if mask is None:
                raise part.failure()
            finite = part.without(mask)
            if not self.kernels.make_deltas(finite.sources, a, Target(center=result), 0).finite:
                raise part.failure()
        total = fsum(a)
        # The tolerance keeps rounding errors of the weights from changing the last bit of equal float64 candidates.
        if not isclose(total, 1, rel_tol=1e-12):
            result.add_(finite.sources[reference_of(a)].to(result.dtype), alpha=total - 1)
        if mask is None or not torch.isfinite(result).all():
            return result, False
        result[mask] = part.sources[0][mask].to(result.dtype)
        return result, True

    def _combined_by_row(self, part: Part, weights: torch.Tensor) -> torch.Tensor:
        """Return the average with the weights of each row, (n, rows)."""
        self._add(part, self.kernels.checksums(part.sources))
        length = prod(self.candidates[-1].shape(part.span.name)) // weights.shape[1]
        first, offset = divmod(part.element(0), length)
        segments = Segments(length, offset, len(part.sources[0]))
        wide = any(source.dtype == torch.float64 for source in part.sources)
        dtype = torch.float64 if wide else torch.float32
        reference = part.sources[0].to(dtype)
        result = reference.clone()
        for source, of_rows in zip(part.sources[1:], weights[1:, first : first + segments.count], strict=True):
            result.addcmul_(source.to(dtype) - reference, segments.spread(of_rows[None].to(dtype))[0])
        if not bool(torch.isfinite(result).all()):
            raise part.failure()
        return result

    def _add(self, part: Part, checksums: torch.Tensor) -> None:
        for total, more in zip([self.checksums[i] for i in part.indices], checksums.tolist(), strict=True):
            total[part.span.name] = wrap(total.get(part.span.name, 0) + more)


def _total(parts: Sequence[Checksums]) -> Checksums:
    total: Checksums = [{} for _ in parts[0]]
    for part in parts:
        for sums, more in zip(total, part, strict=True):
            for name, value in more.items():
                sums[name] = wrap(sums.get(name, 0) + value)
    return total
