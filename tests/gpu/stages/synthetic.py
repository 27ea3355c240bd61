"""Candidates of any size without files: `attach` fills the store with random deltas on its device and reads nothing."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn

from tests.gpu.stages.rows import randomize, repeat
from twa_scale.average import load_candidates
from twa_scale.base.spans import Span
from twa_scale.candidates.streaming import Stream
from twa_scale.kernels import Dense, Packed, Target

BASE, DELTA = 0.02, 1e-3
"""Standard deviations of a weight, and about that of a delta."""


def _ones(part: Tensor) -> Tensor:
    return part.fill_(1.0)


def _normal(part: Tensor) -> Tensor:
    return part.normal_(std=BASE)


class SyntheticStream(Stream):
    """A stream that creates random deltas. Tensors that are not trained are read as in a run."""

    def make_deltas(self, targets: Mapping[Span, Target], weights: Sequence[float]) -> None:
        n = len(self._candidates)
        for span, target in targets.items():
            assert isinstance(target.rows, Dense | Packed) and target.center is not None
            randomize(target.rows)
            if isinstance(target.rows, Packed):
                target.rows.scales.mul_(DELTA / (1 << (target.rows.bits - 1)))
            else:
                target.rows.values.mul_(DELTA)
            repeat(target.center, _ones if span.name.endswith("norm.weight") else _normal)
            if target.products is not None:
                squares = torch.full((n + 1,), len(span) * DELTA**2, dtype=torch.float64)
                target.products.add_((squares.diag() if target.products.ndim == 2 else squares).to(target.products))
            if target.errors is not None:
                target.errors.add_(0.01 * len(span) * DELTA**2)
            self.checksums[span.name] = torch.randint(1 << 40, (n,))

    def check(self, jobs: object) -> None:
        """Read nothing. The checksums are random, too."""


@contextmanager
def synthetic(model: nn.Module, n: int) -> Iterator[list[dict[str, Tensor]]]:
    """Make `attach` create its deltas. Return candidates whose tensors have one value each."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(load_candidates, "Stream", SyntheticStream)
        yield [{name: torch.zeros(1).expand(p.shape) for name, p in model.named_parameters()} for _ in range(n)]
