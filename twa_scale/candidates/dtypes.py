"""The dtypes of tensors that have different floating point types in different candidates."""

from collections.abc import Iterable, Sequence
from functools import reduce
from typing import Protocol, runtime_checkable

import torch

from twa_scale.base.names import quoted
from twa_scale.candidates.candidate import Candidate


@runtime_checkable
class Converting(Protocol):
    """The optional method of a candidate that reads tensors in another type than the stored one."""

    def stored_dtype(self, name: str) -> torch.dtype:
        """Return the type that the tensor has in the file."""


def stored_dtype(candidate: Candidate, name: str) -> torch.dtype:
    """Return the type that a tensor has in the candidate's file or memory."""
    return candidate.stored_dtype(name) if isinstance(candidate, Converting) else candidate.dtype(name)


def widest(candidates: Sequence[Candidate], name: str) -> torch.dtype:
    """Return the narrowest type that holds a tensor of every candidate exactly: float32 for float16 and bfloat16."""
    types = {stored_dtype(candidate, name) for candidate in candidates}
    if len(types) == 1:
        return types.pop()
    wide = [
        dtype for dtype in types if dtype.itemsize > 1
    ]  # torch does not promote float8 types, which fit into any other type
    return reduce(torch.promote_types, wide) if wide else torch.bfloat16


def types_notice(candidates: Sequence[Candidate], names: Iterable[str], *, of_last: bool = False) -> str | None:
    """Return a notice about tensors that have several types in the candidates, or None.

    Args:
        candidates: the candidates.
        names: the tensors.
        of_last: whether the type of the last candidate is written instead of the widest one.
    """
    mixed = [name for name in names if len({stored_dtype(candidate, name) for candidate in candidates}) > 1]
    if not mixed:
        return None
    types = sorted({_plain(stored_dtype(candidate, mixed[0])) for candidate in candidates})
    if of_last:
        return (
            f"candidates hold {quoted(mixed)} as {' and '.join(types)}: written in the type of the last one, "
            f"{_plain(stored_dtype(candidates[-1], mixed[0]))}."
        )
    return (
        f"candidates hold {quoted(mixed)} as {' and '.join(types)}: written in the widest type, "
        f"{_plain(widest(candidates, mixed[0]))}; dtype chooses another."
    )


def _plain(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
