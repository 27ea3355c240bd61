"""Stored tensors under the names and in the shapes of the model: by rules of the user, of its library, or a prefix."""

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from operator import itemgetter
from typing import Protocol

from twa_scale.base.names import and_more, refuse_unused, some, without_wrappers
from twa_scale.candidates.candidate import Candidate
from twa_scale.candidates.conversion import Conversion, Made
from twa_scale.candidates.converted import Converted
from twa_scale.candidates.segments import Segments
from twa_scale.candidates.traced import Traced
from twa_scale.errors import CandidateError, ConfigError

Tensors = dict[str, Traced]


class LibraryRules(Protocol):
    """What a library makes of stored tensors when it loads a model of one of its classes."""

    def loaded(self, tensors: Mapping[str, Traced], label: str) -> tuple[Tensors, list[str]]:
        """Return the tensors by the model's names, others by their own, and the names of those it leaves out."""


@dataclass(frozen=True)
class Naming:
    """How names of candidates become those of the model."""

    rename: Mapping[str, str] = field(default_factory=dict)
    """Regular expressions and what takes their place, in this order."""
    prefix: str | None = None
    """What the names of the model have before them in candidates; found from the names when not given."""
    library: LibraryRules | None = None
    """Of the model's class."""
    parameters: Sequence[Collection[str]] = ()
    """The names of each parameter of the model; a tied one has several."""
    buffers: Collection[str] = ()
    """The names of its buffers."""


def in_live_names(candidates: Sequence[Candidate], naming: Naming) -> tuple[list[Candidate], list[str]]:
    """Return the candidates with the names and shapes of the model, and a line about each thing that was inferred.

    Raises:
        CandidateError: tensors that cannot be converted, or become the same one; or a prefix that is not unique.
        ConfigError: a pattern of `rename` or a `prefix` that no name has.
    """
    _refuse_unused(naming.rename, sorted({name for one in candidates for name in one.names()}))
    said: dict[str, list[str]] = {}
    known: dict[object, tuple[Conversion | None, list[str]]] = {}
    converted = []
    for candidate in candidates:
        traits = frozenset(
            (name, candidate.stored_names[name], candidate.shape(name), candidate.dtype(name))
            for name in candidate.names()
        )
        if traits not in known:  # those of one run are alike
            stored = {
                name: Traced.stored(raw, shape, dtype) for name, raw, shape, dtype in sorted(traits, key=itemgetter(0))
            }
            tensors, lines = _named(stored, naming, candidate.label)
            same = tensors.keys() == stored.keys() and all(tensors[name] is stored[name] for name in stored)
            known[traits] = None if same else _conversion(tensors, stored), lines
        conversion, lines = known[traits]
        for line in lines:
            said.setdefault(line, []).append(candidate.label)
        converted.append(Converted(candidate, conversion) if conversion else candidate)
    return converted, [f"{and_more(labels)}: {line}" for line, labels in said.items()]


def as_recorded(candidate: Candidate, conversions: Sequence[Conversion]) -> Candidate:
    """Return a candidate in the one of conversions that its tensors fit; as it is stored where none is of them."""
    held = set(candidate.stored_names.values())
    fitting = (conversion for conversion in conversions if conversion.stored() <= held)
    return next((Converted(candidate, conversion) for conversion in fitting), candidate)


def _conversion(tensors: Tensors, stored: Tensors) -> Conversion:
    shapes = {str(tensor.origin()): tuple(tensor.shape) for tensor in stored.values()}
    names, made = {}, {}
    for name, tensor in tensors.items():
        if (origin := tensor.origin()) is not None and shapes[origin] == tuple(tensor.shape):
            names[name] = origin
        else:
            segments = Segments(tensor.segments(name))
            of = dict.fromkeys(segment.there.name for segment in segments)
            made[name] = Made(tuple(tensor.shape), segments, {other: shapes[other] for other in of})
    return Conversion(names, made)


def _refuse_unused(rename: Mapping[str, str], names: Sequence[str]) -> None:
    """Refuse a pattern that finds nothing in any name, each after those before it."""
    for pattern, replacement in rename.items():
        refuse_unused("rename", [pattern], names)
        names = [re.sub(pattern, replacement, name) for name in names]


def _named(tensors: Tensors, naming: Naming, label: str) -> tuple[Tensors, list[str]]:
    lines: list[str] = []
    tensors = _renamed(tensors, naming.rename, label)
    if naming.prefix:
        tensors, left_out = _without_prefix(tensors, naming.prefix, label)
        if left_out:
            lines.append(f"tensors without the prefix {naming.prefix!r} are not read: {some(left_out)}.")
    known = {name for names in naming.parameters for name in names} | set(naming.buffers)
    if naming.library and not tensors.keys() <= known:
        tensors, ignored = naming.library.loaded(tensors, label)
        if ignored:
            lines.append(f"the model's class ignores {some(ignored)} when it loads weights: not read.")
    if naming.prefix is None and naming.parameters and not _complete(tensors, naming):
        tensors, line = _inferred(tensors, naming, label)
        lines += [line] if line else []
    return tensors, lines


def _renamed(tensors: Tensors, rename: Mapping[str, str], label: str) -> Tensors:
    renamed: Tensors = {}
    for name, tensor in tensors.items():
        new = name
        for pattern, replacement in rename.items():
            new = re.sub(pattern, replacement, new)
        if new in renamed:
            raise CandidateError(
                f"{label}: `rename` makes {new!r} of both {renamed[new].origin()!r} and {name!r}. Each tensor needs a "
                "name of its own: anchor the pattern (^, $), or name one of them in `ignore`."
            )
        renamed[new] = tensor
    return renamed


def _without_prefix(tensors: Tensors, prefix: str, label: str) -> tuple[Tensors, list[str]]:
    kept = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    if not kept:
        raise ConfigError(f"prefix: no tensor of {label} has a name that begins with {prefix!r}; see {some(tensors)}.")
    return kept, [name for name in tensors if not name.startswith(prefix)]


def _complete(tensors: Tensors, naming: Naming, before: str = "", less: int = 0) -> bool:
    """Whether every parameter is there under one of its names, with `before` put before it and `less` letters cut."""
    return all(any(before + name[less:] in tensors for name in names) for names in naming.parameters)


def _inferred(tensors: Tensors, naming: Naming, label: str) -> tuple[Tensors, str | None]:
    """Take off, or put before, the one prefix with which every parameter is found; leave names alone if none is."""
    known = [name for names in naming.parameters for name in names] + list(naming.buffers)
    plain, held = without_wrappers(known), set(without_wrappers(tensors).values())
    if all(any(plain[name] in held for name in names) for names in naming.parameters):
        return tensors, None  # "module." before all names is a wrapper's, and matched as such
    first = naming.parameters[0]
    possible = sorted({other.removesuffix(name) for name in first for other in tensors if other.endswith(f".{name}")})
    prefixes = [prefix for prefix in possible if _complete(tensors, naming, prefix)]
    if len(prefixes) > 1:
        raise CandidateError(
            f"{label}: holds the tensors of the model {len(prefixes)} times, under {some(prefixes)}. Say which are "
            "meant with `prefix`."
        )
    if prefixes:
        (prefix,) = prefixes
        line = f"names have the prefix {prefix!r} before those of the model: taken off."
        return {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}, line
    for prefix in _common(known):
        if _complete(tensors, naming, less=len(prefix)):
            added = {name.removeprefix(prefix) for name in known}
            named = {prefix + name if name in added else name: tensor for name, tensor in tensors.items()}
            line = f"names of the model have the prefix {prefix!r} before those of the candidates: put before them."
            return named, line
    return tensors, None


def _common(names: Sequence[str]) -> list[str]:
    """Return the prefixes, of whole steps of the path, that all names have."""
    steps = names[0].split(".")[:-1] if names else []
    prefixes = [".".join(steps[: depth + 1]) + "." for depth in range(len(steps))]
    return [prefix for prefix in prefixes if all(name.startswith(prefix) for name in names)]
