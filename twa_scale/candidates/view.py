"""Some of the tensors of a candidate, under other names."""

from collections.abc import Mapping
from dataclasses import replace

import torch

from twa_scale.candidates.candidate import Candidate
from twa_scale.candidates.conversion import Made
from twa_scale.candidates.formats.origin import Origin
from twa_scale.candidates.proxy import CandidateProxy


class View(CandidateProxy):
    """A view of some tensors of another candidate. `names` has the other candidate's name for each name here.

    Two names may refer to one tensor of the other candidate, as for tied weights that are stored once.
    """

    def __init__(self, candidate: Candidate, names: Mapping[str, str]) -> None:
        super().__init__(candidate)
        self._names = dict(sorted(names.items()))
        self.stored_names = {name: self._stored_name(name, own_name) for name, own_name in self._names.items()}

    def _stored_name(self, name: str, own_name: str) -> str:
        """Return the name in the files: a new name has, or lacks, the same prefix in the files as the other name."""
        stored = self._candidate.stored_names[own_name]
        if name == own_name:
            return stored
        if stored.endswith(own_name):
            return stored.removesuffix(own_name) + name
        return name.removeprefix(own_name.removesuffix(stored)) if own_name.endswith(stored) else name

    @property
    def origin(self) -> Origin:
        """The format of the candidate, and the positions of these tensors in its files."""
        origin = super().origin
        stored = {
            self.stored_names[name]: self._candidate.stored_names[own_name] for name, own_name in self._names.items()
        }
        return replace(
            origin,
            keys={
                path: {new: stored_keys[old] for new, old in stored.items() if old in stored_keys}
                for path, stored_keys in origin.keys.items()
            },
        )

    def names(self) -> list[str]:
        """Return the tensor names, sorted."""
        return list(self._names)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor."""
        return super().shape(self._names[name])

    def dtype(self, name: str) -> torch.dtype:
        """Return the type of a tensor in `read`."""
        return super().dtype(self._names[name])

    def read(self, name: str, start: int, out: torch.Tensor) -> None:
        """Fill `out` with the elements from `start` on."""
        super().read(self._names[name], start, out)

    def mapped(self, name: str) -> torch.Tensor | None:
        """Return a flat view of a whole tensor, or None if the candidate has none."""
        return super().mapped(self._names[name])

    def made(self, name: str) -> Made | None:
        """Return the segments of which a tensor is made, or None if it is stored unchanged."""
        return super().made(self._names[name])

    def stored_once(self, name: str, other: str) -> bool:
        """Return whether two names refer to one tensor."""
        own_name, others = self._names[name], self._names[other]
        return own_name == others or super().stored_once(own_name, others)
