"""Candidates whose tensors consist of parts of stored ones. Only the parts that a slice needs are read."""

from collections import Counter
from collections.abc import Iterator
from math import prod

import torch

from twa_scale.candidates.candidate import Candidate
from twa_scale.candidates.conversion import Conversion, Made
from twa_scale.candidates.proxy import CandidateProxy, stored_once
from twa_scale.errors import CandidateError


class Converted(CandidateProxy):
    """A view of a candidate with the names and shapes of a model.

    Raises:
        CandidateError: a part of a stored tensor is used twice or not at all, so that it could not be written again, or
            a complex tensor is divided.
    """

    def __init__(self, candidate: Candidate, conversion: Conversion) -> None:
        super().__init__(candidate)
        self._conversion = conversion
        self._made = conversion.made
        self._by_stored_name = {stored: live_name for live_name, stored in candidate.stored_names.items()}
        self._own_names = {name: self._by_stored_name[stored] for name, stored in conversion.names.items()}
        self._names = sorted([*self._own_names, *self._made])
        self.stored_names = {**conversion.names, **{name: name for name in self._made}}
        self._check()

    def _check(self) -> None:
        num_elements = {stored: prod(self._shape_of(stored)) for stored in self._conversion.stored()}
        # The keys are unique, so that tied tensors count once.
        used = Counter({stored: num_elements[stored] for stored in self._conversion.names.values()})
        for name, one in self._made.items():
            if self.dtype(name).is_complex:
                raise CandidateError(
                    f"{self.label}: tensor {name!r} of the model is made of parts of others and complex, which cannot "
                    "be averaged. Save a state dict of the model instead (torch.save(model.state_dict(), ..))."
                )
            for segment in one.segments:
                used[segment.source.name] += segment.numel
        for stored, count in used.items():
            if count != num_elements[stored]:
                raise CandidateError(
                    f"{self.label}: {count} of the {num_elements[stored]} elements of tensor {stored!r} are used by "
                    "the model; a stored tensor has to be used whole, and once. Save a state dict of the model instead "
                    "(torch.save(model.state_dict(), ..))."
                )

    def _shape_of(self, stored: str) -> tuple[int, ...]:
        return super().shape(self._by_stored_name[stored])

    def names(self) -> list[str]:
        """Return the tensor names, sorted."""
        return self._names

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor."""
        return self._made[name].shape if name in self._made else super().shape(self._own_names[name])

    def dtype(self, name: str) -> torch.dtype:
        """Return the type of a tensor in `read`."""
        own_name = (
            self._by_stored_name[next(iter(self._made[name].stored))] if name in self._made else self._own_names[name]
        )
        return super().dtype(own_name)

    def read(self, name: str, start: int, out: torch.Tensor) -> None:
        """Fill `out` with the elements from `start` on."""
        if name not in self._made:
            super().read(self._own_names[name], start, out)
            return
        for part in self._made[name].segments.within(start, start + len(out)):
            part = part.in_source_order()
            own_name, view = self._by_stored_name[part.source.name], part.of(out, start)
            values = view.view(-1) if view.is_contiguous() else torch.empty(part.numel, dtype=out.dtype)
            for first, count, at in _with_offsets(run for span in part.spans() for run in span.runs()):
                super().read(own_name, first, values[at : at + count])
            if not view.is_contiguous():
                view.copy_(values.view(view.shape))

    def mapped(self, name: str) -> torch.Tensor | None:
        """Return a flat view of a whole tensor, if it is stored unchanged and the candidate can map it, else None."""
        return super().mapped(self._own_names[name]) if name in self._own_names else None

    def stored_once(self, name: str, other: str) -> bool:
        """Return whether two names refer to one tensor."""
        if name in self._made or other in self._made:
            return name == other
        own_name, others = self._own_names[name], self._own_names[other]
        return own_name == others or stored_once(self._candidate, own_name, others)

    def made(self, name: str) -> Made | None:
        """Return the segments of which a tensor is made, or None if it is stored unchanged."""
        return self._made.get(name)

    def conversion(self) -> Conversion | None:
        """Return the conversion of all tensors."""
        return self._conversion


def _with_offsets(runs: Iterator[tuple[int, int]]) -> Iterator[tuple[int, int, int]]:
    """Yield the start and the length of each run, and the total length of the earlier runs."""
    at = 0
    for start, stop in runs:
        yield start, stop - start, at
        at += stop - start
