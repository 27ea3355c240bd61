"""The objects that an average consists of."""

from collections.abc import Sequence
from dataclasses import dataclass

from twa_scale.average.layout import Layout
from twa_scale.candidates import Candidate
from twa_scale.candidates.carry_over import CarriedFiles
from twa_scale.config import TwaConfig
from twa_scale.engines import Engine
from twa_scale.ranks import Pods, Reduction
from twa_scale.store import Store


@dataclass(frozen=True)
class Parts:
    """The settings, the model, the ranks, and the candidates in their store, which exist before the average."""

    config: TwaConfig
    engine: Engine
    """The engine that holds the model."""
    pods: Pods
    """All ranks."""
    reduction: Reduction
    """Sums the gradients of the coefficients over all ranks."""
    layout: Layout
    """Maps trained tensors to groups."""
    store: Store
    """Holds the deltas and the center of this rank's spans."""
    candidates: Sequence[Candidate]
    """The candidates in training order."""
    carried: CarriedFiles
    """The small files that exports copy from the candidates."""
