"""What can be asked of an average: its coefficients, measures of them, costs and provenance."""

from collections.abc import Mapping, Sequence
from math import sqrt
from typing import Any

import torch
from torch import nn

from twa_scale.average.basis import Basis
from twa_scale.average.closing import while_open
from twa_scale.average.layout import Layout
from twa_scale.average.measures import described, effective_candidates
from twa_scale.average.rows import RowCorrections
from twa_scale.average.state import StateForm
from twa_scale.average.swap import SwappedWeights
from twa_scale.average.weights import Weights
from twa_scale.average.written import WrittenCoefficients
from twa_scale.base.clock import Clock
from twa_scale.base.inputs import brief
from twa_scale.base.spans import Span
from twa_scale.candidates import Candidate
from twa_scale.candidates.fingerprint import Fingerprint
from twa_scale.candidates.read_ahead import job_bytes
from twa_scale.config import TwaConfig
from twa_scale.config.kinds import MappedFiles, store_kind
from twa_scale.engines import Engine
from twa_scale.output.provenance import provenance, rows_provenance
from twa_scale.ranks import Pods
from twa_scale.store import Store, step_cost, update_bytes


class Observed:
    """The methods of a `TrainableAverage` that train nothing. It sets the attributes."""

    pods: Pods
    layout: Layout
    fingerprint: Fingerprint
    clock: Clock
    elements: list[int]
    closed: bool
    _engine: Engine
    _store: Store
    _basis: Basis
    _rows: RowCorrections | None
    _candidates: Sequence[Candidate]
    _form: StateForm
    _spans: Mapping[Span, int]
    _x: nn.Parameter
    _swapped: SwappedWeights
    _weights: Weights
    _written: WrittenCoefficients

    @property
    def config(self) -> TwaConfig:
        """The settings; `set_lr` and `load_state_dict` change the learning rate."""
        return self._form.config

    @property
    def num_candidates(self) -> int:
        """The number of candidates, n."""
        return len(self._candidates)

    @property
    def coefficients(self) -> torch.Tensor:
        """The averaging coefficients a, (n, G) float64: w_g = sum_i a[i, g] w_i. In centered bases they sum to 1.

        With `groups: tensor+row` they do not include the corrections of single rows.
        """
        return self._form.averaging(self._x)

    @while_open
    def row_corrections(self) -> dict[str, torch.Tensor]:
        """Return the corrections of the averaging coefficients of each row, (n, rows) float64 by tensor. Collective.

        With `groups: tensor+row`, row r of tensor t is the sum of `(a[i, g] + row_corrections()[t][i, r]) * w_i` over
        i, where g is the group of t. Other groups have none.
        """
        return {} if self._rows is None else self._rows.averaging(self.layout.group_of)

    @while_open
    def row_norms(self) -> dict[str, torch.Tensor]:
        """Return the norms over candidates of `row_corrections`, (rows,) float32 by tensor. Collective.

        They take 1/n of the memory of `row_corrections`. Each rank computes the norms of its rows.
        """
        return {} if self._rows is None else self._rows.norms()

    @property
    def effective_candidates(self) -> float:
        """The number of candidates whose uniform mean reduces independent noise of the candidates as much.

        It is n for the uniform mean, and 1 / sum_i a_i^2 for coefficients of sum 1. For several groups it is the
        harmonic mean over elements.
        """
        return effective_candidates(self.coefficients, self.elements)

    @property
    def candidate_distances(self) -> list[float]:
        """The distance of each candidate from the center: the norm of its delta over all trained elements."""
        return self._basis.gram.diagonal(dim1=1, dim2=2).sum(0)[:-1].clamp(min=0).sqrt().tolist()

    @while_open
    def distance(self) -> float:
        """Return the distance of the current weights from the center: a norm over all trained elements. Collective.

        It reads the store once, and needs float32 memory for the largest span of this rank.
        """
        self._weights.write_deferred()
        with self.pods.agree():
            local = self._weights.squared_distance(self._written.current) * self.pods.share
        return sqrt(float(self.pods.sum_(local)))

    def described(self) -> dict[str, float]:
        """Return values to log: the effective number of candidates, and the mean coefficients of each."""
        return described(self.coefficients, self.elements)

    @property
    def bytes_read(self) -> int:
        """The bytes of the candidates that this rank has read."""
        return sum(candidate.bytes_read for candidate in self._candidates)

    @property
    def store_bytes(self) -> int:
        """The bytes of the deltas and the center on this rank."""
        return self._store.nbytes

    @while_open
    def cost(self, steps: int) -> dict[str, dict[str, float]]:
        """Return the mean seconds of each part of a step since the last call, and the bytes of memory it moves.

        `project` reads the deltas and the gradient. `combine` reads the deltas and the center and writes the weights.
        `publish` makes the weights visible to the engine. `seconds_in_backward` is the time of `project` in backward
        hooks; `seconds_in_forward` is the time that forward passes wait for `combine` with `combine: forward`.

        Args:
            steps: the number of steps since the last call.
        """
        elements = sum(len(span) for span in self._spans)
        weights = sum(self._engine.live(span).nbytes for span in self._spans)
        mapped = 0
        if isinstance(store_kind(self.config.store), MappedFiles):  # these read candidate files instead of deltas
            indices = range(self.num_candidates)
            mapped = job_bytes(self._candidates, [(self.layout.in_candidates(span), indices) for span in self._spans])
        nbytes = update_bytes(self._store.nbytes, elements, mapped=mapped, weights=weights)
        return step_cost(self.clock.read(), nbytes, steps)

    def origin(self, wrote: str = "the live weights of an average", **more: object) -> dict[str, Any]:
        """Return the provenance of the current weights, as in twa_scale.json of an export.

        Args:
            wrote: a name for the output.
            more: further entries.
        """
        current = self._swapped.now
        return provenance(
            wrote,
            self.fingerprint.labels,
            config=self._form.settings(),
            groups=list(self.layout.groups),
            elements=self.elements,
            coefficients=(self.coefficients if current is None else current).tolist(),
            **more,
            **rows_provenance(current is None and self._rows is not None),
        )

    def __repr__(self) -> str:
        parts = (
            f"candidates={self.num_candidates}",
            f"groups={len(self.layout.groups)} ({brief(self.config.groups)})",
            f"basis={self.config.basis!r}",
            f"store={self.config.store!r}",
            f"engine={type(self._engine).__name__}",
        )
        return f"TrainableAverage({', '.join(parts)}{', closed' if self.closed else ''})"
