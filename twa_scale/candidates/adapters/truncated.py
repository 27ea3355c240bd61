"""The average of the products of LoRA adapters, truncated to a lower rank."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import sqrt
from threading import Lock

import torch

from twa_scale.candidates.adapters.concatenated import Concatenated, product_factors
from twa_scale.candidates.adapters.lora_factors import Factors, factors_in
from twa_scale.candidates.candidate import Candidate
from twa_scale.candidates.dtypes import stored_dtype
from twa_scale.candidates.proxy import CandidateProxy


@dataclass(frozen=True)
class Truncation:
    """The squared Frobenius norms of the product of one module, and of the part that was left out."""

    total: float
    left_out: float


class Truncated(CandidateProxy):
    """The best approximation of sum_i a_i s_i B_i A_i in the Frobenius norm by factors of rank at most `rank`.

    B and A of a module are computed in float64 when they are read: from the QR factors of B = [a_i s_i B_i] and of
    A^T = [A_i^T], and the singular values of an R x R matrix. One module is in memory at a time. Both are multiplied by
    the roots of the singular values. This candidate replaces the last one, and has its other tensors.

    Args:
        candidates: adapters in the space of products.
        weights: the weights a_i.
        rank: the maximum rank of a module.
    """

    def __init__(self, candidates: Sequence[Concatenated], weights: Sequence[float], rank: int) -> None:
        super().__init__(candidates[-1])
        self._candidates = candidates
        self._weights = weights
        self._factors = {
            name: pair for pair in factors_in(candidates[-1].names()).values() for name in (pair.a, pair.b)
        }
        self.exact_ranks = candidates[-1].ranks
        self.ranks = {pair.module: min(rank, self.exact_ranks[pair.module]) for pair in self._factors.values()}
        self.units = {name: pair.module for name, pair in self._factors.items()}
        """The module of each factor. One rank computes both factors of a module."""
        self.truncations: dict[str, Truncation] = {}
        """The truncation of each module that was read by this process."""
        self._lock = Lock()
        self._last: tuple[str, dict[str, torch.Tensor]] = ("", {})

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor."""
        shape = super().shape(name)
        if name not in self._factors:
            return shape
        pair = self._factors[name]
        rank = self.ranks[pair.module] * self._candidates[-1].experts.get(pair.module, 1)
        return (rank, *shape[1:]) if name == pair.a else (shape[0], rank, *shape[2:])

    def dtype(self, name: str) -> torch.dtype:
        """Return the type of a tensor in `read`."""
        return torch.float64 if name in self._factors else super().dtype(name)

    def stored_dtype(self, name: str) -> torch.dtype:
        """Return the type that the tensor has in the file."""
        return stored_dtype(self._candidate, name)

    def read(self, name: str, start: int, out: torch.Tensor) -> None:
        """Fill `out` with the elements from `start` on."""
        if name not in self._factors:
            super().read(name, start, out)
            return
        with self._lock:
            pair = self._factors[name]
            if self._last[0] != pair.module:
                self._last = (pair.module, self._computed(pair))
            out.copy_(self._last[1][name].view(-1)[start : start + len(out)])

    def mapped(self, name: str) -> None:
        """Return None, because no file contains the computed tensors."""

    def _computed(self, pair: Factors) -> dict[str, torch.Tensor]:
        a, b = product_factors(self._candidates, pair, self._weights)
        q_b, r_b = torch.linalg.qr(b)
        q_a, r_a = torch.linalg.qr(a.mT)
        u, values, v = torch.linalg.svd(r_b @ r_a.mT, full_matrices=False)
        rank = self.ranks[pair.module]
        squares = values.square()
        self.truncations[pair.module] = Truncation(float(squares.sum()), float(squares[:, rank:].sum()))
        roots = values[:, :rank].sqrt()
        experts, kept = roots.shape  # a small module has fewer singular values than `rank`; the others are zero
        low_a = torch.zeros(experts, rank, a.shape[2], dtype=a.dtype)
        low_b = torch.zeros(b.shape[1], rank, experts, dtype=b.dtype)
        low_a[:, :kept] = roots[:, :, None] * (v[:, :rank] @ q_a.mT)
        low_b[:, :kept] = ((q_b @ u[:, :, :rank]) * roots[:, None]).permute(1, 2, 0)
        return {pair.a: low_a, pair.b: low_b}


def ranks_of(candidate: Candidate) -> Mapping[str, int]:
    """Return the rank of every module of a candidate in the space of products; empty for other candidates."""
    return candidate.ranks if isinstance(candidate, Concatenated | Truncated) else {}


def relative_error(truncations: Sequence[Truncation]) -> float:
    """Return the Frobenius norm of the truncated part divided by that of the whole; 0 if the whole is 0."""
    total = sum(truncation.total for truncation in truncations)
    return sqrt(sum(truncation.left_out for truncation in truncations) / total) if total else 0.0
