"""The interface of a basis: the map from the trained coefficients x to the weights u of the deltas and the center.

The weights of a group of tensors are w = (1 + u_c) c + sum_i u_i delta_i. All tensors here have the size of n, the
number of candidates. Rows of u, T and the Gram matrix are the n deltas, then the center. `bases.py` has the bases.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import torch
from typing_extensions import Self

from twa_scale.config import TwaConfig

_EXACT = 1e-6  # squared norm of an error, relative to that of the sum of deltas
_ROUNDED = 4e-12  # relative to that of the center: bases drop directions that are rounding errors of float32 weights


class Gram:
    """Inner products of deltas and center per group, in float64: (G, n + 1, n + 1).

    Args:
        num_groups: the number of groups, G.
        n: the number of candidates.
        device: the device of the deltas.
        diagonal: compute the squared norms only, and leave the other products zero.
    """

    def __init__(self, num_groups: int, n: int, device: torch.device, *, diagonal: bool = False) -> None:
        self._diagonal = diagonal
        self.values = torch.zeros(num_groups, n + 1, n + 1, dtype=torch.float64, device=device)

    def of(self, group: int) -> torch.Tensor:
        """Return the view that sums the products of a group: (n + 1, n + 1), or the diagonal (n + 1,)."""
        return self.values[group].diagonal() if self._diagonal else self.values[group]


class Basis(ABC):
    """The map from coefficients x (k, G) to the weights u (n + 1, G) of the deltas and the center.

    Args:
        gram: (G, n + 1, n + 1), float64; with `norms_only`, diagonal.
        center_weights: b (n,), float64, with the center c = sum_i b_i w_i.
    """

    norms_only: ClassVar[bool] = False
    """Whether the basis needs only the diagonal of the Gram matrix, which is cheaper to compute."""
    needs_center: ClassVar[bool] = False
    """Whether the gradient of the coefficients depends on <center, gradient>."""

    def __init__(self, gram: torch.Tensor, center_weights: torch.Tensor) -> None:
        self.gram = gram
        self.center_weights = center_weights

    @classmethod
    def check(cls, config: TwaConfig, center_weights: Sequence[float]) -> None:
        """Check that the coefficients can be trained with these settings.

        Raises:
            ConfigError: names the setting.
        """
        del config, center_weights  # any start can be trained

    @classmethod
    def make(cls, config: TwaConfig, gram: torch.Tensor, center_weights: torch.Tensor) -> Self:
        """Return the basis with its settings in `config`.

        Raises:
            ConfigError: the settings do not fit these candidates.
        """
        del config
        return cls(gram, center_weights)

    @abstractmethod
    def expand(self, x: torch.Tensor) -> torch.Tensor:
        """Return u (n + 1, G) for x (k, G). Autograd differentiates it, so a basis can be nonlinear."""

    def can_start_at(self, a: torch.Tensor) -> bool:
        """Return whether training can start at sum_i a_i w_i, for a (n, G)."""
        del a
        return True

    def represents(self, a: torch.Tensor) -> bool:
        """Return whether the weights of `locate(a)` are sum_i a_i w_i up to rounding, for a (n, G).

        `locate` returns the nearest weights if the basis does not span all directions of the candidates, as `pca` with
        few components.
        """
        if not self.can_start_at(a):
            return False
        target = self.weights_of(a)
        deltas = torch.cat([target[:-1], torch.zeros_like(target[-1:])])
        error, size = self._squared(self.expand(self.locate(a)) - target), self._squared(deltas)
        return bool((error <= _EXACT * size + _ROUNDED * self.gram[:, -1, -1]).all())

    def _squared(self, u: torch.Tensor) -> torch.Tensor:
        """Return the squared norms (G,) of u_c c + sum_i u_i delta_i, for u (n + 1, G)."""
        return torch.einsum("ig,gij,jg->g", u, self.gram, u)

    @abstractmethod
    def locate(self, a: torch.Tensor) -> torch.Tensor:
        """Return the x (k, G) whose weights are nearest to sum_i a_i w_i, for a (n, G)."""

    def averaging(self, u: torch.Tensor) -> torch.Tensor:
        """Return the averaging coefficients a (n, G): w = sum_i a_i w_i with a_i = u_i + (1 + u_c - sum_j u_j) b_i."""
        return u[:-1] + (1 + u[-1] - u[:-1].sum(0)) * self.center_weights[:, None]

    def weights_of(self, a: torch.Tensor) -> torch.Tensor:
        """Return the u (n + 1, G) of exactly sum_i a_i w_i, for a (n, G) of any sum."""
        # The store holds the center itself. A sum of deltas would add their rounding.
        is_center = (a == self.center_weights[:, None]).all(0)
        return torch.cat([a.masked_fill(is_center, 0), a.sum(0, keepdim=True).masked_fill(is_center, 1) - 1])
