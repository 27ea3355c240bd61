"""Tied weights: one tensor of the model that files may store under some or all of its names."""

import re
from collections.abc import Sequence
from math import prod

import torch

from twa_scale.base.names import and_more
from twa_scale.candidates.candidate import Candidate
from twa_scale.candidates.model_config import settings_of
from twa_scale.candidates.view import View

_CHUNK = 1 << 20  # elements to compare at a time
_HEAD = re.compile(r"(^|\.)(lm_head|embed_out|output|head|output_projection|decoder|lm_head\.decoder)\.weight$")
_NOT_VOCABULARY = re.compile(r"type|position|segment|patch")
_MAX_MISSING = 8  # names: if a candidate lacks more, it is another model
_SAMPLE = 16  # elements to compare before the rest is read
_EMBEDDING = re.compile(r"(^|\.)\w*(embed\w*|wte|shared|token\w*)\.weight$")

Ties = Sequence[Sequence[str]]
"""Groups of names, each of one tensor of the model."""


def complete(candidates: Sequence[Candidate], ties: Ties | None) -> tuple[list[Candidate], list[str]]:
    """Add the missing names of tied tensors to the candidates that store them under another name.

    Args:
        candidates: the candidates.
        ties: the groups of tied names of the model. If None, tensors with equal bits in all other candidates are tied.

    Returns:
        The candidates, and a line for each missing name.

    Raises:
        CandidateError: a file cannot be read.
    """
    stored_names = [set(candidate.names()) for candidate in candidates]
    all_names = set().union(*stored_names)
    completed: list[Candidate] = []
    lacking: dict[tuple[str, str], list[str]] = {}
    for candidate, names in zip(candidates, stored_names, strict=True):
        twins = {}
        missing = sorted(all_names - names)
        for name in missing:
            if ties is None:
                is_few = len(missing) <= _MAX_MISSING
                equal_name = _find_equal_tensor(name, candidate, candidates, stored_names) if is_few else None
            else:
                group = next((group for group in ties if name in group), ())
                equal_name = next((other for other in group if other in names), None)
            if equal_name:
                twins[name] = equal_name
                lacking.setdefault((name, equal_name), []).append(candidate.label)
        completed.append(View(candidate, {n: n for n in names} | twins) if twins else candidate)
    return completed, [
        f"{and_more(labels)}: tensor {name!r} is not stored; it is tied to {equal_name!r} and read from there."
        for (name, equal_name), labels in lacking.items()
    ]


def likely_ties(candidates: Sequence[Candidate]) -> list[tuple[str, str]]:
    """Return the pairs of an embedding and a head that may be tied, by their names and shapes.

    The caller compares their values: tied tensors are equal in all candidates.
    """
    last = candidates[-1]
    names = [name for name in last.names() if len(last.shape(name)) == 2]
    heads, embeddings = ([n for n in names if pattern.search(n)] for pattern in (_HEAD, _EMBEDDING))
    embeddings = [name for name in embeddings if not _NOT_VOCABULARY.search(name.split(".")[-2])]
    return [(e, h) for e in embeddings for h in heads if e != h and last.shape(e) == last.shape(h)]


def has_tied_embeddings(candidate: Candidate) -> bool:
    """Return whether `tie_word_embeddings` is true in the config.json of a candidate."""
    return settings_of(candidate).get("tie_word_embeddings") is True


def _find_equal_tensor(
    name: str, candidate: Candidate, candidates: Sequence[Candidate], stored_names: Sequence[set[str]]
) -> str | None:
    """Return a tensor of `candidate` that is equal to the tensor `name` in all candidates that have both, else None.

    `stored_names` has the names of each candidate.
    """
    holders = [(other, names) for other, names in zip(candidates, stored_names, strict=True) if name in names]
    shape, dtype = holders[0][0].shape(name), holders[0][0].dtype(name)
    if len(shape) < 2 or not dtype.is_floating_point:  # zero biases are equal without being tied
        return None
    for equal_name in (equal_name for equal_name in candidate.names() if candidate.shape(equal_name) == shape):
        both = [other for other, names in holders if equal_name in names]
        if both and all(_equal(other, name, equal_name) for other in both):
            return equal_name
    return None


def _equal(candidate: Candidate, name: str, other: str) -> bool:
    """Return whether two tensors of a candidate have equal bits and are not constant. It reads both."""
    if (candidate.shape(other), candidate.dtype(other)) != (candidate.shape(name), candidate.dtype(name)):
        return False
    numel, varies = prod(candidate.shape(name)), False
    first, second = (torch.empty(min(numel, _CHUNK), dtype=candidate.dtype(name)) for _ in range(2))
    pieces = [(0, min(_SAMPLE, numel)), *((start, min(_CHUNK, numel - start)) for start in range(0, numel, _CHUNK))]
    for start, count in pieces:
        for values, tensor in ((first, name), (second, other)):
            candidate.read(tensor, start, values[:count])
        if not torch.equal(first[:count].view(torch.uint8), second[:count].view(torch.uint8)):
            return False
        varies = varies or bool((first[:count] != first[0]).any())
    return varies
