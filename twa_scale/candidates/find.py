"""Find the candidates of a glob or a list of paths, without repetitions."""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from twa_scale.base.inputs import named_errors
from twa_scale.base.names import and_more, quoted
from twa_scale.base.notices import notice
from twa_scale.base.paths import identity, num_links
from twa_scale.base.urls import Url
from twa_scale.candidates.directory import INDEX, is_weights, sharded_in, unused_files, weights_in
from twa_scale.candidates.expand import expand, versions_or_parts
from twa_scale.candidates.formats.deepspeed import is_deepspeed, tagged_folder
from twa_scale.candidates.formats.sharded import weight_map
from twa_scale.candidates.steps import chosen, is_copy, step_of
from twa_scale.config import SelectConfig
from twa_scale.errors import CandidateError

Source = Path | Url | Mapping[str, torch.Tensor]
"""A candidate before it is opened."""
Spec = str | Path | Sequence[str | Path] | Sequence[Mapping[str, torch.Tensor]]
Notify = Callable[[str], None]
"""A function that is called with each line for the user."""

_Files = frozenset[tuple[object, ...]]
"""The identity of the files of a candidate, independent of their paths."""


@dataclass(frozen=True)
class _Named:
    """A source, and the pattern that matched it; None if the user named it."""

    source: Source
    pattern: str | None = None


def find_sources(
    spec: Spec, minimum: int = 2, notify: Notify = notice, select: SelectConfig | None = None
) -> list[Source]:
    """Return the paths and state dicts of `spec` that `select` takes, in order, without opening them.

    Files that a glob matches under several paths, as with a link `latest -> step-2`, are one candidate. Paths that are
    given twice in a list count twice, with a notice.

    Args:
        spec: see `open_candidates`.
        minimum: the smallest number of candidates.
        notify: called with each line for the user.
        select: the range and the order of the candidates; by default, all as they are found.

    Raises:
        CandidateError: fewer than `minimum` candidates are found, or a glob also matches a path that is not a
            candidate or is another version of one.
        ConfigError: `select` takes no candidate.
    """
    with named_errors():
        items = spec_items(spec)
        named: list[_Named] = []
        for item in items:
            paths, pattern = ([item], None) if isinstance(item, Mapping) else expand(item)
            named += [_Named(path, pattern) for path in paths]
        by_name = [
            named_source.source
            for named_source in named
            if isinstance(named_source.source, Path | Url) and not named_source.pattern
        ]
        if reason := versions_or_parts(by_name):
            notify(f"candidates: {reason} They are averaged as given.")
        named = _without_copies(_without_repeated_matches(named, notify), notify)
        sources = chosen([named_source.source for named_source in named], select or SelectConfig(), notify)
        if len(sources) < minimum:
            raise CandidateError(_too_few(items, sources, minimum))
        _notify_of_unused_files([source for source in sources if isinstance(source, Path | Url)], notify)
        return sources


def spec_items(spec: Spec) -> list[str | Path | Mapping[str, torch.Tensor]]:
    """Return the items of `spec`; a single path or glob is a list of one.

    Raises:
        CandidateError: an item is neither a path nor a state dict.
    """
    source: Any = spec
    several = isinstance(source, Iterable) and not isinstance(source, str | Mapping)
    items: list[Any] = list(source) if several else [source]
    for item in items:
        if not isinstance(item, str | Path | Mapping) or (isinstance(item, Mapping) and not several):
            fix = "; give its state_dict()" if hasattr(item, "state_dict") else ""
            raise CandidateError(
                f"candidates: a glob, or a list of paths or state dicts is expected, not {type(item).__name__}{fix}."
            )
    return items


def _without_repeated_matches(named: Sequence[_Named], notify: Notify) -> list[_Named]:
    """Remove repeated matches of globs, and report them and items that are named twice."""
    indices: dict[_Files, list[int]] = defaultdict(list)
    for i, item in enumerate(named):
        if isinstance(item.source, Path | Url):
            indices[files_of(item.source)].append(i)
    left_out: dict[int, int] = {}  # index of a repetition -> index of the source that is kept
    for same in indices.values():
        by_name = [i for i in same if named[i].pattern is None]
        kept = by_name or [min(same, key=lambda i: num_links(Path(str(named[i].source))))]
        left_out |= {i: kept[0] for i in same if i not in kept}
        if len(by_name) > 1:
            labels = list(dict.fromkeys(repr(str(named[i].source)) for i in by_name))
            notify(
                f"candidates: {' and '.join(labels)} are the same and count {len(by_name)} times, because they were "
                "given more than once."
            )
    if left_out:
        repeated = [f"{str(named[i].source)!r} ({str(named[kept].source)!r})" for i, kept in left_out.items()]
        more = f" and {len(repeated) - 3} more" if len(repeated) > 3 else ""
        notify(f"candidates: counted once, as the same files under another path: {', '.join(repeated[:3])}{more}.")
    return [item for i, item in enumerate(named) if i not in left_out]


def _without_copies(named: Sequence[_Named], notify: Notify) -> list[_Named]:
    """Leave out and report matches with the names of copies of steps, if a pattern also matches several steps."""
    matched = [item.source for item in named if item.pattern and isinstance(item.source, Path | Url)]
    steps = Counter(path.parent for path in matched if step_of(path, parents=0) is not None)
    copies = [path for path in matched if steps[path.parent] > 1 and is_copy(path)]
    if copies:
        notify(
            f"candidates: left out by their names, as copies or later steps: {quoted(map(str, copies))}. Give their "
            "paths in a list to use them."
        )
    return [item for item in named if not (item.pattern and item.source in copies)]


def copies(labels: Sequence[str], checksums: Sequence[Any]) -> list[str]:
    """Return the names of the candidates of each group with equal checksums, such as a directory and its copies.

    Further paths of the same files are left out, because they are reported when the candidates are found.

    Args:
        labels: the labels of the candidates.
        checksums: the checksums of the tensors of each candidate, in a form that can be compared. Empty ones are not
            compared.
    """
    groups: list[tuple[Any, list[str]]] = []
    for label, sums in zip(labels, checksums, strict=True):
        members = next((members for other, members in groups if other == sums), None)
        if members is None:
            groups += [(sums, [label])] if sums else []
        elif not any(_same_files(label, member) for member in members):
            members.append(label)
    return [
        f"{first} and {and_more(others)}" if len(others) < 2 else f"{first}, {and_more(others)}"
        for _, (first, *others) in groups
        if others
    ]


def _same_files(first: str, second: str) -> bool:
    """Return whether two labels of candidates are paths of the same files."""
    try:
        return files_of(Path(first)) == files_of(Path(second))
    except OSError:  # labels of state dicts, or files that were removed
        return False


def files_of(path: Path | Url) -> _Files:
    """Return the identity of the files of a candidate, which is the same for every path of them.

    Raises:
        CandidateError: it is ambiguous which files of a directory are the candidate.
    """
    if isinstance(path, Url):
        return frozenset([(path.url.rstrip("/"),)])
    if path.is_dir():
        path = weights_in(path) or (tagged_folder(path) if is_deepspeed(path) else sharded_in(path) or path)
    if path.is_dir():
        return frozenset(identity(file) for file in path.iterdir() if file.is_file()) or frozenset([identity(path)])
    if path.name.endswith(INDEX):
        shards = [path.parent / file for file in set(weight_map(path).values())]
        return frozenset(identity(file) for file in shards if file.is_file())
    return frozenset([identity(path)])


def _notify_of_unused_files(paths: Sequence[Path | Url], notify: Notify) -> None:
    unused: dict[tuple[str, str], list[str]] = defaultdict(list)
    for path in paths:
        chosen = _weights_in(path)
        if chosen and (others := unused_files(path, chosen)):
            unused[chosen.name, quoted(others)].append(str(path))
    for (chosen_name, other_names), directories in unused.items():
        notify(
            f"{and_more(directories)}: the weights are those of {chosen_name!r}, which loaders take; "
            f"{other_names} next to it is not read. To read it, give the path of this file."
        )


def _weights_in(path: Path | Url) -> Path | Url | None:
    if isinstance(path, Url):
        return None if is_weights(path.name) else weights_in(path)
    return weights_in(path) if path.is_dir() else None


def _too_few(items: Sequence[object], sources: Sequence[object], minimum: int) -> str:
    if not items:
        return f"candidates: the list is empty; give {minimum} or more paths, globs or state dicts."
    only = f" ({sources[0]})" if isinstance(sources[0], Path | Url) else ""
    return (
        f"candidates: found {len(sources)}{only}, but an average needs at least {minimum}. Widen the "
        f"pattern, or save candidates more often while training (twa_scale.Snapshots)."
    )
