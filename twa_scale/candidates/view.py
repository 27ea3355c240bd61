"""Some of the tensors of a candidate, under other names."""

from collections.abc import Mapping
from dataclasses import replace

import torch

from twa_scale.candidates.candidate import Candidate
from twa_scale.candidates.conversion import Made
from twa_scale.candidates.formats.origin import Origin
from twa_scale.candidates.proxy import CandidateProxy


class View(CandidateProxy):
    """A candidate that shows the tensors `names` of another: the name there, by the name here.

    Two names here may stand for one there, as the names of tied weights do that are stored once.
    """

    def __init__(self, candidate: Candidate, names: Mapping[str, str]) -> None:
        super().__init__(candidate)
        self._names = dict(sorted(names.items()))
        self.stored_names = {name: self._stored_name(name, own) for name, own in self._names.items()}

    def _stored_name(self, name: str, own: str) -> str:
        """Return the name in the files: a new name has, or lacks, the same prefix in the files as the other name."""
        stored = self._candidate.stored_names[own]
        if name == own:
            return stored
        if stored.endswith(own):
            return stored.removesuffix(own) + name
        return name.removeprefix(own.removesuffix(stored)) if own.endswith(stored) else name

    @property
    def origin(self) -> Origin:
        """The format of the candidate, and where its files hold these tensors."""
        origin = super().origin
        stored = {self.stored_names[name]: self._candidate.stored_names[own] for name, own in self._names.items()}
        return replace(
            origin,
            keys={
                path: {new: held[old] for new, old in stored.items() if old in held}
                for path, held in origin.keys.items()
            },
        )

    def names(self) -> list[str]:
        """Return the tensor names, sorted."""
        return list(self._names)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor."""
        return super().shape(self._names[name])

    def dtype(self, name: str) -> torch.dtype:
        """Return the type in which `read` delivers a tensor."""
        return super().dtype(self._names[name])

    def read(self, name: str, start: int, out: torch.Tensor) -> None:
        """Fill `out` with the elements from `start` on."""
        super().read(self._names[name], start, out)

    def mapped(self, name: str) -> torch.Tensor | None:
        """Return a view of a whole tensor, flattened, where the candidate offers one."""
        return super().mapped(self._names[name])

    def made(self, name: str) -> Made | None:
        """Return of what a tensor is made; None where it is stored as it is."""
        return super().made(self._names[name])

    def stored_once(self, name: str, other: str) -> bool:
        """Whether two names stand for one tensor."""
        own, others = self._names[name], self._names[other]
        return own == others or super().stored_once(own, others)
