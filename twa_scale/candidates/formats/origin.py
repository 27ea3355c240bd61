"""The positions of the weights in the files of a candidate, for outputs that are written in the same format."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol, runtime_checkable

Keys = tuple[str, ...]


@dataclass(frozen=True)
class Origin:
    """The format of a candidate, and the positions of the weights in its files."""

    description: str
    """The format, for messages."""
    written_as: Literal["hf", "pt", "dcp", "deepspeed"] | None = None
    """The format of an output that has this form; None if no output has."""
    keys: Mapping[Path, Mapping[str, Keys]] = field(default_factory=dict)
    """The path of keys of each tensor by its stored name, for each file of torch.save or for the folder of DCP."""
    versions: Mapping[Path, tuple[int, int]] = field(default_factory=dict)
    """The size and the time of the last change of the files that were read when the candidate was opened."""

    @property
    def nesting(self) -> Keys:
        """The path of keys of the mapping that holds all weights; empty if they are not in one mapping."""
        parents = {keys[:-1] for names in self.keys.values() for keys in names.values()}
        named = any(keys[-1] == name for names in self.keys.values() for name, keys in names.items())  # not in a list
        return parents.pop() if len(parents) == 1 and named else ()


@runtime_checkable
class HasOrigin(Protocol):
    """The interface of a candidate in files."""

    @property
    def origin(self) -> Origin:
        """The format of the candidate, and where its files hold the weights."""


def origin_of(candidate: object) -> Origin:
    """Return the origin of a candidate."""
    return candidate.origin if isinstance(candidate, HasOrigin) else Origin("a state dict in memory")
