"""Candidates whose tensors are made of stored ones: read by the ranges of each that a slice needs."""

from collections import Counter
from collections.abc import Iterator, Mapping
from math import prod

import torch

from twa_scale.candidates.candidate import Candidate
from twa_scale.candidates.made import Made
from twa_scale.candidates.proxy import Wrapped, stored_once
from twa_scale.candidates.segments import Segments
from twa_scale.candidates.traced import Traced
from twa_scale.errors import CandidateError


class Converted(Wrapped):
    """A candidate that shows the stored tensors of another under the names and in the shapes of a model.

    Args:
        candidate: as it is stored.
        tensors: by name here; those that are not named here are left out.

    Raises:
        CandidateError: a stored tensor of which a part is used twice, or never: it could not be written again.
    """

    def __init__(self, candidate: Candidate, tensors: Mapping[str, Traced]) -> None:
        super().__init__(candidate)
        self._own: dict[str, str] = {}
        self._made: dict[str, Made] = {}
        for name, tensor in sorted(tensors.items()):
            if (own := tensor.origin()) is not None and candidate.shape(own) == tuple(tensor.shape):
                self._own[name] = own
            else:
                self._made[name] = _made(candidate, name, tensor)
        self._names = sorted(tensors)
        self._require_all_once()
        self.stored_names = {name: candidate.stored_names[own] for name, own in self._own.items()}
        self.stored_names |= {name: name for name in self._made}

    def _require_all_once(self) -> None:
        used = Counter(
            {own: prod(self._candidate.shape(own)) for own in self._own.values()}
        )  # two names of one tensor, as of tied weights, count once
        for one in self._made.values():
            for segment in one.segments:
                used[segment.there.name] += segment.numel
        for own, count in used.items():
            if count != (numel := prod(self._candidate.shape(own))):
                raise CandidateError(
                    f"{self.label}: {count} of the {numel} elements of tensor {own!r} are used by the model; a stored "
                    "tensor has to be used whole, and once. Save a state dict of the model in its place "
                    "(torch.save(model.state_dict(), ..))."
                )

    def names(self) -> list[str]:
        """Return the tensor names, sorted."""
        return self._names

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor."""
        return self._made[name].shape if name in self._made else super().shape(self._own[name])

    def dtype(self, name: str) -> torch.dtype:
        """Return the type in which `read` delivers a tensor."""
        return self._made[name].dtype if name in self._made else super().dtype(self._own[name])

    def read(self, name: str, start: int, out: torch.Tensor) -> None:
        """Fill `out` with the elements from `start` on."""
        if name not in self._made:
            super().read(self._own[name], start, out)
            return
        for part in self._made[name].segments.within(start, start + len(out)):
            part = part.in_order_there()
            place = part.of(out, start)
            values = place.view(-1) if place.is_contiguous() else torch.empty(part.numel, dtype=out.dtype)
            for (first, stop), at in _with_offsets(run for span in part.spans() for run in span.runs()):
                super().read(part.there.name, first, values[at : at + stop - first])
            if not place.is_contiguous():
                place.copy_(values.view(place.shape))

    def mapped(self, name: str) -> torch.Tensor | None:
        """Return a view of a whole tensor, flattened, where it is stored as it is and the candidate offers one."""
        return super().mapped(self._own[name]) if name in self._own else None

    def stored_once(self, name: str, other: str) -> bool:
        """Whether two names stand for one tensor."""
        if name in self._made or other in self._made:
            return name == other
        own, others = self._own[name], self._own[other]
        return own == others or stored_once(self._candidate, own, others)

    def made(self, name: str) -> Made | None:
        """Return of what a tensor is made; None where it is stored as it is."""
        return self._made.get(name)


def _made(candidate: Candidate, name: str, tensor: Traced) -> Made:
    if tensor.dtype.is_complex:
        raise CandidateError(
            f"{candidate.label}: tensor {name!r} of the model is made of parts of others and complex, which cannot be "
            "averaged. Save a state dict of the model in its place (torch.save(model.state_dict(), ..))."
        )
    segments = Segments(tensor.segments(name))
    others = dict.fromkeys(segment.there.name for segment in segments)
    stored = {other: (candidate.stored_names[other], candidate.shape(other)) for other in others}
    return Made(tuple(tensor.shape), tensor.dtype, segments, stored)


def _with_offsets(runs: Iterator[tuple[int, int]]) -> Iterator[tuple[tuple[int, int], int]]:
    at = 0
    for start, stop in runs:
        yield (start, stop), at
        at += stop - start
