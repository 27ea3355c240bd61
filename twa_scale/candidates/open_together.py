"""Open the same candidates on every rank: one rank resolves the paths, and all compare the candidates."""

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from math import prod
from pathlib import Path
from typing import Any

import torch

from twa_scale.base.notices import ignore_notice, notice
from twa_scale.base.paths import path_of
from twa_scale.base.urls import is_url
from twa_scale.candidates.candidate import Candidate
from twa_scale.candidates.find import Source, Spec, find_sources, spec_items
from twa_scale.candidates.formats.remote_file import check_once_at_end
from twa_scale.candidates.open import open_sources
from twa_scale.candidates.select import ALL, Wanted
from twa_scale.config import SelectConfig
from twa_scale.errors import CandidateError
from twa_scale.ranks import Ranks, first_difference

_SAMPLES = 512  # samples of a candidate; more if it has more tensors
_SAMPLES_OF_A_TENSOR = 8  # at most
_ELEMENTS = 16  # elements of a sample
_THREADS = 8
_NUMBER = "the number of candidates"

Key = tuple[int, str] | str
"""The index of a candidate and the name of one of its tensors; or `_NUMBER`."""


def open_together(
    spec: Spec, group: Ranks, minimum: int = 2, wanted: Wanted = ALL, select: SelectConfig | None = None
) -> list[Candidate]:
    """Open the candidates of `spec` on every rank of `group`, and check that they are the same. Collective.

    The first rank resolves globs, and ranks with the same `spec` open the same paths. Ranks may have different paths,
    for example of copies on local disks. The ranks compare names, shapes and dtypes of all tensors, and a few values
    of each, to find different copies without reading them.

    Args:
        spec: see `open_candidates`.
        group: the ranks.
        minimum: the smallest number of candidates.
        wanted: the tensors to read.
        select: the range and the order of the candidates; the same on every rank.

    Raises:
        CandidateError: as in `open_candidates`, or if candidates differ between ranks; on every rank.
    """
    candidates: list[Candidate] = []
    try:
        sources = _resolved(spec, group, minimum, select)
        with group.agree():
            candidates = open_sources(sources, wanted, notice if group.rank == 0 else ignore_notice)
        _require_same(candidates, group)
    except BaseException:
        for candidate in candidates:
            candidate.close()
        raise
    return candidates


def _resolved(spec: Spec, group: Ranks, minimum: int, select: SelectConfig | None) -> list[Source]:
    """Return the sources of this rank, which are those of the first rank if all ranks have the same `spec`."""
    with group.agree():
        items: Any = spec_items(spec)  # a list: `spec` may be a generator
        inputs = {i: _checked_item(item) for i, item in enumerate(items)}
    other = first_difference(group, inputs)
    sources: list[Source] = []
    with group.agree():
        if other or group.rank == 0:
            sources = find_sources(items, minimum, notice if group.rank == 0 else ignore_notice, select)
    shared_sources = group.broadcast([None if isinstance(source, Mapping) else source for source in sources])
    if other or group.rank == 0:
        return sources
    state_dicts = iter([item for item in items if isinstance(item, Mapping)])
    return [next(state_dicts) if path is None else path for path in shared_sources]


def _checked_item(item: object) -> str:
    """Return a name of an item that ranks can compare: ranks may have different working directories."""
    if not isinstance(item, str | Path):
        return "a state dict"
    return str(item) if is_url(item) else str(path_of(item).absolute())


def _require_same(candidates: Sequence[Candidate], group: Ranks) -> None:
    if group.size == 1:
        return
    with group.agree(), ThreadPoolExecutor(_THREADS, "twa-scale-sample") as pool:
        traits = list(pool.map(_traits, candidates))
    entries: dict[Key, object] = {_NUMBER: len(candidates)}
    entries |= {(i, name): trait for i, by_name in enumerate(traits) for name, trait in by_name.items()}
    other = first_difference(group, entries)
    labels = group.broadcast([candidate.label for candidate in candidates])
    with group.agree():
        if other is None:
            return
        rule = "Give all ranks the same candidates, in the same order; copies on local disks must be equal."
        if other.key == _NUMBER:
            raise CandidateError(
                f"{candidates[0].label}: {other.location} has {other.local} candidates and {other.first_location} has "
                f"{other.first}, from {labels[0]} on. {rule}"
            )
        i, name = other.key
        raise CandidateError(
            f"{candidates[i].label}: tensor {name!r} on {other.location} is not that of {labels[i]} on "
            f"{other.first_location}. {rule}"
        )


def _traits(candidate: Candidate) -> dict[str, tuple[tuple[int, ...], str, str]]:
    """Return shape, dtype and samples of every tensor. Samples are not counted in `bytes_read`."""
    before = candidate.bytes_read
    names = candidate.names()
    count = min(max(_SAMPLES // max(len(names), 1), 1), _SAMPLES_OF_A_TENSOR)
    with check_once_at_end():
        traits = {
            name: (candidate.shape(name), str(candidate.dtype(name)), _sampled(candidate, name, count))
            for name in names
        }
    candidate.bytes_read = before
    return traits


def _sampled(candidate: Candidate, name: str, count: int) -> str:
    """Return `count` samples of a tensor at equal distances, as hexadecimal text."""
    numel = prod(candidate.shape(name))
    values = torch.empty(min(numel, _ELEMENTS), dtype=candidate.dtype(name))
    room = numel - len(values)
    # A single sample is in the middle; several include both ends.
    starts = {room * i // (count - 1) for i in range(count)} if count > 1 else {room // 2}
    sampled = []
    for start in sorted(starts if numel else ()):
        candidate.read(name, start, values)
        sampled.append(values.view(torch.uint8).numpy().tobytes().hex())
    return " ".join(sampled)
