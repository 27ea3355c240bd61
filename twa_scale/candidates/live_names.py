"""Stored tensors with the names and shapes of the model: by rules of the user, rules of its library, or a prefix."""

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from operator import itemgetter
from typing import Protocol

from twa_scale.base.names import and_more, quoted, refuse_unused, without_wrappers
from twa_scale.candidates.candidate import Candidate
from twa_scale.candidates.conversion import Conversion, Made
from twa_scale.candidates.converted import Converted
from twa_scale.candidates.prefixes import (
    Tensors,
    add_prefix,
    by_new_name,
    choose_prefix,
    common_prefixes,
    likely_prefix,
    remove_prefix,
)
from twa_scale.candidates.segments import Segments
from twa_scale.candidates.stacked import unstacked
from twa_scale.candidates.traced import Traced
from twa_scale.errors import CandidateError, ConfigError


class LibraryRules(Protocol):
    """The conversion that a library applies to stored tensors when it loads a model of one of its classes."""

    def loaded(self, tensors: Mapping[str, Traced], label: str) -> tuple[Tensors, list[str]]:
        """Return the tensors by the model's names, or by their own if unknown, and the names of ignored ones."""


@dataclass(frozen=True)
class Naming:
    """The settings that map names of candidates to those of the model."""

    rename: Mapping[str, str] = field(default_factory=dict)
    """Regular expressions and their replacements, applied in this order."""
    prefix: str | None = None
    """The prefix of the model's names in candidates; by default, inferred from the names."""
    library: LibraryRules | None = None
    """The rules of the model's class."""
    parameters: Sequence[Collection[str]] = ()
    """The names of each parameter of the model. A tied parameter has several."""
    buffers: Collection[str] = ()
    """The names of the buffers of the model."""
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """The shapes of parameters and buffers, by each of their names."""


def in_live_names(candidates: Sequence[Candidate], naming: Naming) -> tuple[list[Candidate], list[str]]:
    """Return the candidates with the names and shapes of the model, and a notice about each inferred setting.

    Raises:
        CandidateError: tensors cannot be converted, or get the same name, or the prefix is not unique.
        ConfigError: a pattern of `rename`, or `prefix`, matches no name.
    """
    _refuse_unused(naming.rename, sorted({name for other in candidates for name in other.names()}))
    notices: dict[str, list[str]] = {}
    known: dict[object, tuple[Conversion | None, list[str]]] = {}
    converted = []
    for candidate in candidates:
        traits = frozenset(
            (name, candidate.stored_names[name], candidate.shape(name), candidate.dtype(name))
            for name in candidate.names()
        )
        if traits not in known:  # the candidates of one run have the same
            stored = {
                name: Traced.stored(raw, shape, dtype) for name, raw, shape, dtype in sorted(traits, key=itemgetter(0))
            }
            tensors, lines = _named(stored, naming, candidate.label)
            same = tensors.keys() == stored.keys() and all(tensors[name] is stored[name] for name in stored)
            known[traits] = None if same else _conversion(tensors, stored), lines
        conversion, lines = known[traits]
        for line in lines:
            notices.setdefault(line, []).append(candidate.label)
        converted.append(Converted(candidate, conversion) if conversion else candidate)
    return converted, [f"{and_more(labels)}: {line}" for line, labels in notices.items()]


def as_recorded(candidate: Candidate, conversions: Sequence[Conversion]) -> Candidate:
    """Return a candidate with the conversion that fits its tensors, or unchanged if there is none."""
    stored = set(candidate.stored_names.values())
    fitting = (conversion for conversion in conversions if conversion.stored() <= stored)
    return next((Converted(candidate, conversion) for conversion in fitting), candidate)


def _conversion(tensors: Tensors, stored: Tensors) -> Conversion:
    shapes = {str(tensor.origin()): tuple(tensor.shape) for tensor in stored.values()}
    names, made = {}, {}
    for name, tensor in tensors.items():
        if (origin := tensor.origin()) is not None and shapes[origin] == tuple(tensor.shape):
            names[name] = origin
        else:
            segments = Segments(tensor.segments(name))
            of = dict.fromkeys(segment.source.name for segment in segments)
            made[name] = Made(tuple(tensor.shape), segments, {other: shapes[other] for other in of})
    return Conversion(names, made)


def _refuse_unused(rename: Mapping[str, str], names: Sequence[str]) -> None:
    """Check that each pattern, applied after the earlier ones, matches a name."""
    for pattern, replacement in rename.items():
        refuse_unused("rename", [pattern], names)
        names = [re.sub(pattern, replacement, name) for name in names]


def _named(tensors: Tensors, naming: Naming, label: str) -> tuple[Tensors, list[str]]:
    tensors = _renamed(tensors, naming.rename, label)
    left_out: list[str] = []
    if naming.prefix:
        tensors, left_out = _without_prefix(tensors, naming.prefix, label)
    tensors, unstacked_tensors = _unstacked(tensors, naming, label)
    loaded, lines = _loaded(tensors, naming, label)
    lines += unstacked_tensors
    if left_out:
        lines.insert(0, f"tensors without the prefix {naming.prefix!r} are not read: {quoted(left_out)}.")
    if naming.prefix is None and naming.parameters and not _complete(loaded, naming):
        inferred = _inferred(loaded, naming, label) or _inferred_and_loaded(tensors, naming, label)
        if inferred:
            return inferred[0], lines + inferred[1]
    return loaded, lines


def _loaded(tensors: Tensors, naming: Naming, label: str) -> tuple[Tensors, list[str]]:
    """Return the tensors as converted by the model's library, if names or shapes differ from those of the model."""
    known = {name for names in naming.parameters for name in names} | set(naming.buffers)
    same = tensors.keys() <= known and all(
        tuple(tensor.shape) == naming.shapes.get(name, tuple(tensor.shape)) for name, tensor in tensors.items()
    )
    if naming.library is None or same:
        return tensors, []
    loaded, ignored = naming.library.loaded(tensors, label)
    return loaded, [f"the model's class ignores {quoted(ignored)} when it loads weights: not read."] if ignored else []


def _renamed(tensors: Tensors, rename: Mapping[str, str], label: str) -> Tensors:
    def new(name: str) -> str:
        for pattern, replacement in rename.items():
            name = re.sub(pattern, replacement, name)
        return name

    fix = "anchor the pattern (^, $), or name one of them in `ignore`"
    return by_new_name(tensors, new, f"{label}: `rename`", fix)


def _without_prefix(tensors: Tensors, prefix: str, label: str) -> tuple[Tensors, list[str]]:
    kept = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    if not kept:
        raise ConfigError(
            f"prefix: no tensor of {label} has a name that begins with {prefix!r}; see {quoted(tensors)}."
        )
    return kept, [name for name in tensors if not name.startswith(prefix)]


def _unstacked(tensors: Tensors, naming: Naming, label: str) -> tuple[Tensors, list[str]]:
    """Divide tensors that stack all layers or experts and lack their numbers, and report them."""
    known = [name for names in naming.parameters for name in names] + list(naming.buffers)
    result = unstacked(tensors, known, label)
    if not result:
        return tensors, []
    kept = {name: tensor for name, tensor in tensors.items() if name not in result}
    made = {name: part for parts in result.values() for name, part in parts.items()}
    first, parts = next(iter(result.items()))
    return kept | made, [
        f"stored tensors that stack those of all layers are divided ({quoted(list(result))}): {first!r} is "
        f"{quoted(list(parts), 2)}."
    ]


def _complete(tensors: Tensors, naming: Naming, before: str = "", num_removed: int = 0) -> bool:
    """Return whether every parameter has a known name, with `num_removed` letters removed and `before` added."""
    return all(any(before + name[num_removed:] in tensors for name in names) for names in naming.parameters)


def _inferred(tensors: Tensors, naming: Naming, label: str) -> tuple[Tensors, list[str]] | None:
    """Remove or add the only prefix with which every parameter is found, or return None if there is none."""
    known = [name for names in naming.parameters for name in names] + list(naming.buffers)
    plain, stored = without_wrappers(known), set(without_wrappers(tensors).values())
    if all(any(plain[name] in stored for name in names) for names in naming.parameters):
        return tensors, []  # "module." before all names is the prefix of a wrapper, which is matched elsewhere
    first = naming.parameters[0]
    possible = sorted({other.removesuffix(name) for name in first for other in tensors if other.endswith(f".{name}")})
    prefixes = [prefix for prefix in possible if _complete(tensors, naming, prefix)]
    if len(prefixes) > 1:
        raise CandidateError(
            f"{label}: holds the tensors of the model {len(prefixes)} times, under {quoted(prefixes)}. Choose one with "
            "`prefix`."
        )
    if prefixes:
        return remove_prefix(tensors, prefixes[0], label), [_removed_prefix_notice(prefixes[0])]
    for prefix in common_prefixes(known):
        if _complete(tensors, naming, num_removed=len(prefix)):
            return add_prefix(tensors, prefix, known, label), [
                f"names of the model have the prefix {prefix!r}, which those of the candidates lack: added."
            ]
    return None


def _inferred_and_loaded(tensors: Tensors, naming: Naming, label: str) -> tuple[Tensors, list[str]] | None:
    """Remove the prefix with which the model's library finds every parameter, or return None if there is none."""
    if naming.library is None:
        return None
    known = {name for names in naming.parameters for name in names} | set(naming.buffers)
    likely = likely_prefix(tensors, known)
    for prefix in dict.fromkeys([*([likely] if likely else []), *common_prefixes(list(tensors))]):
        prefixed = {name: tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        try:
            loaded, lines = _loaded(remove_prefix(prefixed, prefix, label), naming, label)
        except CandidateError:  # the rules do not fit the tensors with this prefix
            continue
        if _complete(loaded, naming):
            others = {name: tensor for name, tensor in tensors.items() if name not in prefixed}
            if repeated := sorted(others.keys() & loaded.keys()):
                raise CandidateError(
                    f"{label}: {quoted(repeated)} and tensors whose names begin with {prefix!r} are the same tensors "
                    f"of the model: {choose_prefix(prefix)}."
                )
            return loaded | others, [_removed_prefix_notice(prefix), *lines]
    return None


def _removed_prefix_notice(prefix: str) -> str:
    return f"names have the prefix {prefix!r}, which those of the model lack: removed."
