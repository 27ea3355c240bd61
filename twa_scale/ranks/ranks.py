"""Ranks that work together: sums of small tensors, exchange of small objects, and errors raised on every rank."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch

from twa_scale.errors import RankError, TwaError

T = TypeVar("T")


class Ranks(ABC):
    """Some or all ranks of a launcher. Every method is collective."""

    size: int
    """The number of ranks."""
    rank: int
    """The position of this rank."""

    @property
    @abstractmethod
    def name(self) -> str:
        """The name of this rank for messages."""

    @abstractmethod
    def sum_(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum `tensor` over the ranks in place; the result is bitwise equal on every rank."""

    @abstractmethod
    def gather(self, value: T) -> list[T]:
        """Return the `value` of every rank, ordered by rank. For small objects."""

    @abstractmethod
    def broadcast(self, value: T, source: int = 0) -> T:
        """Return the `value` of rank `source` on every rank. For small objects."""

    @contextmanager
    def agree(self) -> Iterator[None]:
        """Raise an error of the body on any rank on every rank, so that no rank waits for one that failed. Collective.

        The body may contain a collective only if an error of one rank before it is raised on every rank, as by a nested
        `agree`. Otherwise a rank that failed would not join it.

        Raises:
            RankError: a RankError of the body, at once and only on this rank; or another rank runs other code.
        """
        failure: Exception | None = None
        try:
            yield
        except RankError:
            raise
        except Exception as error:
            failure = error
        failures = [(rank, error) for rank, error in enumerate(self.gather(_portable(failure))) if error is not None]
        if any(not isinstance(error, Exception) for _, error in failures):
            raise RankError(
                f"{self.name}: another rank is at another place of the program. "
                "Call the same methods in the same order on all ranks, with models of the same kind."
            ) from failure
        if not failures:
            return
        rank, first = failures[0]
        for known in (first, failure):
            if isinstance(known, TwaError):
                known.agreed = True
        if failure is not None and rank == self.rank:
            raise failure
        raise first from failure


def _portable(error: Exception | None) -> Exception | None:
    """Return an error that can be pickled: a TwaError unchanged, another error as a RuntimeError with its text."""
    if error is None or isinstance(error, TwaError):
        return error
    return RuntimeError(f"{type(error).__name__}: {error}")
