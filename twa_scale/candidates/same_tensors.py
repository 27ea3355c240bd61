"""Check that candidates have the same tensors."""

from collections import Counter
from collections.abc import Sequence

import torch

from twa_scale.base.names import nearest
from twa_scale.candidates.candidate import Candidate
from twa_scale.errors import CandidateError

Trait = tuple[tuple[int, ...], str]
"""The shape and the kind of number of a tensor."""


def require_same_tensors(candidates: Sequence[Candidate]) -> None:
    """Check that all candidates have the tensors of the majority, or of the first one in a tie.

    Raises:
        CandidateError: names the different candidate, the tensor, its traits and the expected ones.
    """
    traits = [{name: (c.shape(name), _kind(c.dtype(name))) for name in c.names()} for c in candidates]
    expected: dict[str, Trait] = {}
    for name in {name: None for names in traits for name in names}:
        (trait, _), *_ = Counter(names.get(name) for names in traits).most_common(1)
        if trait is not None:
            expected[name] = trait
    for candidate, names in zip(candidates, traits, strict=True):
        _check_one(candidate.label, names, expected)


def _check_one(label: str, traits: dict[str, Trait], expected: dict[str, Trait]) -> None:
    missing = [name for name in expected if name not in traits]
    extra = [name for name in traits if name not in expected]
    rule = (
        "Candidates must hold the same tensors: name tensors that need not be averaged in `ignore` (--ignore), save "
        "all from the same model, or leave this one out."
    )
    if missing:
        more = f" and {len(missing) - 1} others are" if len(missing) > 1 else " is"
        raise CandidateError(
            f"{label}: tensor {missing[0]!r}{more} missing, which the other candidates "
            f"have{nearest(missing[0], extra) or '.'} {rule}"
        )
    if extra:
        more = f" and {len(extra) - 1} others" if len(extra) > 1 else ""
        raise CandidateError(
            f"{label}: holds tensor {extra[0]!r}{more}, which the other candidates do not "
            f"have{nearest(extra[0], expected) or '.'} {rule}"
        )
    for name, (shape, kind) in traits.items():
        expected_shape, expected_kind = expected[name]
        if shape != expected_shape:
            raise CandidateError(
                f"{label}: tensor {name!r} has shape {shape}, where the other candidates have "
                f"{expected_shape}. Candidates must be of one architecture: leave this one out"
                f"{'' if kind == 'floating point' else ', or name the tensor in `ignore` (--ignore)'}."
            )
        if kind != expected_kind:
            raise CandidateError(
                f"{label}: tensor {name!r} is {kind}, where the other candidates have it {expected_kind}. "
                "Only floating point types may differ between candidates: save this one in the same type, or "
                "leave it out."
            )


def _kind(dtype: torch.dtype) -> str:
    if dtype.is_complex:
        return "complex"
    return "floating point" if dtype.is_floating_point else str(dtype).removeprefix("torch.")
