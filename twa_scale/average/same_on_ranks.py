"""Checks that all ranks train the same coefficients with the same settings."""

import math
from hashlib import sha256

import torch

from twa_scale.errors import TwaError
from twa_scale.ranks import Pods, first_difference

_TOLERANCE = 1e-6  # relative; processors of different types may round the optimizer's arithmetic differently


class SameOnRanks:
    """Compares what determines a step, except the reduced gradient: coefficients, optimizer settings and loss scale.

    Each rank steps its own copy of the coefficients. With a learning rate or a loss scale of its own, a rank would get
    other coefficients, and the shards of the model would belong to different averages.

    Args:
        pods: all ranks.
        x: the coefficients.
        optimizer: the optimizer, whose groups schedulers change.
    """

    def __init__(self, pods: Pods, x: torch.Tensor, optimizer: torch.optim.Optimizer) -> None:
        self._pods = pods
        self._x = x
        self._optimizer = optimizer

    def require_in_step(self, number: int, loss_scale: float) -> None:
        """Check the ranks in the steps 1, 2, 4, 8, .., whose number is the same on all ranks. Collective.

        Raises:
            TwaError: as `require` does.
        """
        if number & (number - 1) == 0:
            self.require(loss_scale)

    def require(self, loss_scale: float | None = None) -> None:
        """Check that all ranks have the same settings and coefficients. Collective.

        Args:
            loss_scale: the factor of the loss in this step.

        Raises:
            TwaError: names the value, the rank and the fix; on every rank.
        """
        if self._pods.size == 1:
            return
        settings: dict[str, object] = {} if loss_scale is None else {"the scale of the loss": loss_scale}
        for part, group in zip(("", " for rows"), self._optimizer.param_groups, strict=False):
            names = {f"{key} of the optimizer{part}": value for key, value in group.items() if key != "params"}
            settings |= {name: _plain(value) for name, value in names.items()}
        other = first_difference(self._pods, settings)
        with self._pods.agree():
            if other:
                raise TwaError(
                    f"{other.key}: {other.location} has {other.local} and {other.first_location} has {other.first}, "
                    "so their coefficients would differ. Set it on all ranks; give schedulers such as "
                    "ReduceLROnPlateau a metric that is reduced over all ranks."
                )
        norms = self._pods.gather(float(self._x.detach().norm()))
        with self._pods.agree():
            if not all(math.isclose(norm, norms[0], rel_tol=_TOLERANCE, abs_tol=_TOLERANCE) for norm in norms):
                raise TwaError(
                    "the coefficients of the ranks differ: at some step they had different learning rates or loss "
                    "scales, or a rank left out a step. Load the last state with load_state_dict on all ranks."
                )


def _plain(value: object) -> object:
    """Return a setting of an optimizer in a form that ranks can compare."""
    if isinstance(value, torch.Tensor):
        numbers = value.detach().cpu()
        return numbers.item() if numbers.numel() == 1 else sha256(numbers.numpy().tobytes()).hexdigest()[:16]
    return value if isinstance(value, int | float | str | tuple | None) else type(value).__name__
