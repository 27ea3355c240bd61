"""Finding candidates: what a glob or a list of paths names, each of them once."""

import glob
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from twa_scale.errors import CandidateError
from twa_scale.names import and_more, some
from twa_scale.notices import notice
from twa_scale.sources.deepspeed import is_deepspeed, tagged_folder
from twa_scale.sources.directory import INDEX, is_averaged, is_weights, left_aside, plain_names, weights_in
from twa_scale.sources.sharded import weight_map

Source = Path | Mapping[str, torch.Tensor]
"""One candidate that is not opened yet."""
Spec = str | Path | Sequence[str | Path] | Sequence[Mapping[str, torch.Tensor]]
Tell = Callable[[str], None]
"""What is called with each line that a user should see."""

_Files = frozenset[tuple[int, int, int, int]]
"""What identifies the files of a candidate, under whatever paths they are reached."""


@dataclass(frozen=True)
class _Named:
    """A source, and the pattern that matched it; None where the user has named it."""

    source: Source
    pattern: str | None = None


def find_sources(spec: Spec, minimum: int = 2, tell: Tell = notice) -> list[Source]:
    """Return the paths and state dicts that `spec` names, in order; nothing is opened.

    Files that a glob matches under several paths, as through `latest -> step-2`, are one candidate. What is named twice
    in a list counts twice, and is reported.

    Raises:
        CandidateError: nothing found, fewer than `minimum`, or a glob that also matches what is no candidate, or what
            is another version of one.
    """
    items = spec_items(spec)
    named = [one for item in items for one in ([_Named(item)] if isinstance(item, Mapping) else _find(item))]
    sources = _without_repeated_matches(named, tell)
    if len(sources) < minimum:
        raise CandidateError(_too_few(items, sources, minimum))
    _tell_what_is_left_aside([source for source in sources if isinstance(source, Path)], tell)
    return sources


def spec_items(spec: Spec) -> list[str | Path | Mapping[str, torch.Tensor]]:
    """Return what `spec` lists, a single path or glob as a list of one.

    Raises:
        CandidateError: something that is neither path nor state dict.
    """
    given: Any = spec
    several = isinstance(given, Iterable) and not isinstance(given, str | Mapping)
    items: list[Any] = list(given) if several else [given]
    for item in items:
        if not isinstance(item, str | Path | Mapping) or (isinstance(item, Mapping) and not several):
            fix = "; give its state_dict()" if hasattr(item, "state_dict") else ""
            raise CandidateError(
                f"candidates: a glob, or a list of paths or state dicts is expected, not {type(item).__name__}{fix}."
            )
    return items


def _find(item: str | Path) -> list[_Named]:
    """Return the path itself, or what it matches as a glob, in natural order."""
    path = Path(item).expanduser()
    if path.exists():
        return [_Named(path)]
    pattern = str(path)
    if not glob.has_magic(pattern):
        aside = next(path.parent.glob(f".{glob.escape(path.name)}.old-????????"), None)
        hint = f" A writer that was killed has moved it to {str(aside)!r}: rename that." if aside else ""
        raise CandidateError(f"{pattern}: there is no such file or directory, seen from {Path.cwd()}.{hint}")
    matches = glob.glob(pattern, recursive=True)  # noqa: PTH207 - Path.glob takes no absolute pattern
    found = [Path(match) for match in matches if not _hidden(match, pattern)]
    if not found:
        raise CandidateError(
            f"candidates {pattern!r}: the pattern matches nothing, seen from {Path.cwd()}. It must match at "
            "least one file or directory of weights."
        )
    strange = next((match for match in found if not match.is_dir() and not is_weights(match.name)), None)
    if strange:
        raise CandidateError(
            f"candidates {pattern!r}: the pattern also matches {str(strange)!r}, which holds no weights, "
            f"seen from {Path.cwd()}. Narrow the pattern, for instance to 'step-*' or '*.safetensors'."
        )
    found = sorted(found, key=_natural)
    _refuse_versions(pattern, found)
    return [_Named(path, pattern) for path in found]


def _hidden(match: str, pattern: str) -> bool:
    """Whether a wildcard matched an output that a writer has not finished."""
    literal = next(i for i, part in enumerate(Path(pattern).parts) if glob.has_magic(part))
    return any(part.startswith(".") or ".tmp-" in part for part in Path(match).parts[literal:])


def _natural(path: Path) -> list[tuple[int, int, str]]:
    """Order numbers by value, the rest as text; separators come first, so that parents stay together."""
    pieces = re.split(r"(\d+)", str(path).replace("/", "\0"))
    return [(0, int(piece), piece) if piece.isdecimal() else (1, 0, piece) for piece in pieces if piece]


def _refuse_versions(pattern: str, found: Sequence[Path]) -> None:
    """Refuse matches in one directory that are two versions of one model: raw and averaged, or of two precisions."""
    by_parent: dict[Path, list[str]] = defaultdict(list)
    for path in found:
        by_parent[path.parent].append(path.name)
    for parent, names in by_parent.items():
        held = set(names)
        averaged = [name for name in names if is_averaged(name)]
        raw = [name for name in names if not is_averaged(name)]
        two = (raw[0], averaged[0]) if raw and averaged else None
        two = two or next(((plain, name) for name in names for plain in plain_names(name) if plain in held), None)
        if two:
            raise CandidateError(
                f"candidates {pattern!r}: the pattern matches {two[0]!r} and {two[1]!r} in {str(parent)!r}, which by "
                "their names are versions of one model. Narrow the pattern to one of them, or give a list of paths if "
                "both are meant."
            )


def _without_repeated_matches(named: Sequence[_Named], tell: Tell) -> list[Source]:
    """Leave out what a glob matches again, or what is named as well; report that, and what is named twice."""
    places: dict[_Files, list[int]] = defaultdict(list)
    for i, one in enumerate(named):
        if isinstance(one.source, Path):
            places[files_of(one.source)].append(i)
    left_out: dict[int, int] = {}  # and what it is the same as
    for same in places.values():
        by_name = [i for i in same if named[i].pattern is None]
        kept = by_name or [min(same, key=lambda i: _num_links(named[i].source))]
        left_out |= {i: kept[0] for i in same if i not in kept}
        if len(by_name) > 1:
            labels = list(dict.fromkeys(repr(str(named[i].source)) for i in by_name))
            tell(
                f"candidates: {' and '.join(labels)} count {len(by_name)} times, as they were named: they are the same."
            )
    if left_out:
        again = [f"{str(named[i].source)!r} ({str(named[kept].source)!r})" for i, kept in left_out.items()]
        more = f" and {len(again) - 3} more" if len(again) > 3 else ""
        tell(f"candidates: counted once, as the same files under another path: {', '.join(again[:3])}{more}.")
    return [one.source for i, one in enumerate(named) if i not in left_out]


def same_files(first: str, second: str) -> bool:
    """Whether two labels of candidates are paths that lead to the same files."""
    paths = [Path(first), Path(second)]
    return all(path.exists() for path in paths) and files_of(paths[0]) == files_of(paths[1])


def files_of(path: Path) -> _Files:
    """Return what identifies the files of a candidate, the same under each path that leads to them.

    Raises:
        CandidateError: a directory of which it is not clear which files are meant.
    """
    if path.is_dir():
        path = weights_in(path) or (tagged_folder(path) if is_deepspeed(path) else path)
    if path.is_dir():
        return frozenset(_identity(file) for file in path.iterdir() if file.is_file())
    if path.name.endswith(INDEX):
        shards = [path.parent / file for file in set(weight_map(path).values())]
        return frozenset(_identity(file) for file in shards if file.is_file())
    return frozenset([_identity(path)])


def _identity(file: Path) -> tuple[int, int, int, int]:
    # Size and time as well: some network file systems give different files the same number.
    stat = file.stat()
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns


def _num_links(source: Source) -> int:
    return sum(part.is_symlink() for part in (source, *source.parents)) if isinstance(source, Path) else 0


def _tell_what_is_left_aside(paths: Sequence[Path], tell: Tell) -> None:
    found: dict[tuple[str, str], list[str]] = defaultdict(list)
    for path in paths:
        chosen = weights_in(path) if path.is_dir() else None
        if chosen and (beside := left_aside(path, chosen)):
            found[chosen.name, some(beside)].append(str(path))
    for (chosen_name, beside_names), directories in found.items():
        tell(
            f"{and_more(directories)}: the weights are those of {chosen_name!r}, which loaders take; "
            f"{beside_names} beside it is not read. Name the file itself if that is meant."
        )


def _too_few(items: Sequence[object], sources: Sequence[object], minimum: int) -> str:
    if not items:
        return f"candidates: the list is empty; give {minimum} or more paths, globs or state dicts."
    only = f" ({sources[0]})" if isinstance(sources[0], Path) else ""
    return (
        f"candidates: found {len(sources)}{only}, but an average needs at least {minimum}. Widen the "
        f"pattern, or save candidates more often while training (twa_scale.Snapshots)."
    )
