"""LoRA adapters with concatenated factors, so that averages of their products are averages of tensors."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

import torch

from twa_scale.candidates.adapters.lora_factors import Factors, factors_in, rank_of
from twa_scale.candidates.candidate import Candidate
from twa_scale.candidates.dtypes import stored_dtype
from twa_scale.candidates.proxy import CandidateProxy


@dataclass(frozen=True)
class _Position:
    """The position of the tensor of one adapter in the concatenation of all adapters, along one dimension.

    The row-major flattening of the concatenation has rows of `width` elements, of which [start, start + owned) belong
    to the adapter. Other elements are zero.
    """

    dim: int
    size: int
    """The size of the concatenation along `dim`."""
    start: int
    owned: int
    width: int

    def before(self, element: int) -> int:
        """Return how many of the first `element` elements belong to the adapter."""
        row, column = divmod(element, self.width)
        return row * self.owned + min(max(column - self.start, 0), self.owned)


class Concatenated(CandidateProxy):
    """One of several LoRA adapters, with factors of rank R = sum_i r_i that are zero outside of its ranks.

    With A = [A_1; ..; A_n] and B = [a_1 B_1, .., a_n B_n] the product B A is sum_i a_i B_i A_i. Therefore, B is sum_i
    a_i B^(i) over these candidates, and A is the sum of their A^(i) for any coefficients. The zeros are not read.

    Args:
        candidate: one of the adapters, its B multiplied by its scaling.
        positions: the positions of its factors, by tensor.
        ranks: R by module.
        owned: the range [first, stop) of its ranks, by module.
        experts: the number of stacked matrices A and B of each module: one, except for experts that PEFT adapts as one
            tensor.
    """

    def __init__(
        self,
        candidate: Candidate,
        positions: Mapping[str, _Position],
        ranks: Mapping[str, int],
        owned: Mapping[str, tuple[int, int]],
        experts: Mapping[str, int],
    ) -> None:
        super().__init__(candidate)
        self._positions = positions
        self.ranks = ranks
        self.owned = owned
        self.experts = experts
        self.adapter = candidate
        """The adapter that is concatenated with the others."""
        self.summed = frozenset(name for name, position in positions.items() if position.dim == 0)
        """The names of the A of all modules."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor."""
        shape, position = super().shape(name), self._positions.get(name)
        return shape if position is None else (*shape[: position.dim], position.size, *shape[position.dim + 1 :])

    def stored_dtype(self, name: str) -> torch.dtype:
        """Return the type that the tensor has in the file."""
        return stored_dtype(self._candidate, name)

    def read(self, name: str, start: int, out: torch.Tensor) -> None:
        """Fill `out` with the elements from `start` on. Those of the adapter are read at once."""
        position = self._positions.get(name)
        if position is None:
            super().read(name, start, out)
            return
        stop, width = start + len(out), position.width
        first = position.before(start)
        values = torch.empty(position.before(stop) - first, dtype=out.dtype)
        if len(values):
            super().read(name, first, values)
        out.zero_()
        begin = start
        while begin < stop:
            row = begin // width * width
            if begin == row and stop - begin >= width:
                end = stop // width * width  # all whole rows at once
                rows = values[position.before(begin) - first : position.before(end) - first].view(-1, position.owned)
                out[begin - start : end - start].view(-1, width)[
                    :, position.start : position.start + position.owned
                ] = rows
            else:
                end = min(stop, row + width)
                left, right = max(begin, row + position.start), min(end, row + position.start + position.owned)
                if left < right:
                    out[left - start : right - start] = values[
                        position.before(left) - first : position.before(right) - first
                    ]
            begin = end

    def mapped(self, name: str) -> torch.Tensor | None:
        """Return a flat view of a whole tensor, or None for a factor, because no file contains the concatenation."""
        return None if name in self._positions else super().mapped(name)


def concatenated(candidates: Sequence[Candidate], experts: Mapping[str, int]) -> list[Candidate]:
    """Return LoRA adapters as `Concatenated`. Their B are already multiplied by their scalings.

    Args:
        candidates: LoRA adapters.
        experts: the number of stacked matrices in the factors of each module.

    Raises:
        CandidateError: the shapes of factors do not fit each other.
    """
    factors = [factors_in(candidate.names()) for candidate in candidates]
    ranks = [
        {module: rank_of(candidate, pair) // experts.get(module, 1) for module, pair in modules.items()}
        for candidate, modules in zip(candidates, factors, strict=True)
    ]
    totals = Counter[str]()
    for adapter_ranks in ranks:
        totals.update(adapter_ranks)
    starts = dict.fromkeys(totals, 0)
    result: list[Candidate] = []
    for candidate, modules, owned in zip(candidates, factors, ranks, strict=True):
        positions: dict[str, _Position] = {}
        parts = {}
        for module, pair in modules.items():
            stacked = experts.get(module, 1)
            positions |= _positions_of(candidate, pair, starts[module], owned[module], totals[module], stacked)
            parts[module] = (starts[module], starts[module] + owned[module])
            starts[module] += owned[module]
        result.append(Concatenated(candidate, positions, totals, parts, experts))
    return result


def _positions_of(
    candidate: Candidate, factors: Factors, start: int, owned: int, total: int, experts: int
) -> dict[str, _Position]:
    """Return the positions of the factors. PEFT stacks A as (experts, r, in), and B as (out, r, experts)."""
    positions = {}
    for name, dim, inner in ((factors.a, 0, prod(candidate.shape(factors.a)[1:])), (factors.b, 1, experts)):
        positions[name] = _Position(dim, total * experts, start * inner, owned * inner, total * inner)
    return positions


def product_factors(
    candidates: Sequence[Concatenated], factors: Factors, weights: Sequence[float]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return A (experts, R, in) and B (experts, out, R) of sum_i a_i s_i B_i A_i of one module, in float64."""
    experts = candidates[-1].experts.get(factors.module, 1)
    a, b = _sum(candidates, factors.a, [1.0] * len(candidates)), _sum(candidates, factors.b, weights)
    return a.view(experts, -1, a.shape[1]), b.view(len(b), -1, experts).permute(2, 0, 1)


def _sum(candidates: Sequence[Concatenated], name: str, weights: Sequence[float]) -> torch.Tensor:
    shape = candidates[-1].shape(name)
    total = torch.zeros(prod(shape), dtype=torch.float64)
    for candidate, weight in zip(candidates, weights, strict=True):
        values = torch.empty(prod(shape), dtype=candidate.dtype(name))
        candidate.read(name, 0, values)
        total.add_(values, alpha=weight)
    return total.view(shape[0], -1)


def summed(candidate: Candidate) -> frozenset[str]:
    """Return the tensors whose value is the sum over all candidates, for any coefficients."""
    return candidate.summed if isinstance(candidate, Concatenated) else frozenset()
