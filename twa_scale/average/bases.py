"""The bases: one class for each `basis` of the configuration."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import torch
from typing_extensions import Self, assert_never

from twa_scale.average.basis import Basis
from twa_scale.config import TwaConfig
from twa_scale.config.kinds import BasisName
from twa_scale.errors import ConfigError

_EIGENVALUE_FLOOR = 1e-10  # relative to the largest; smaller ones are rounding noise of float32 deltas
_RELATIVE_FLOOR = 1e-6  # relative to the largest delta norm
_ROUNDING = 1e-7  # relative to the center's norm: rounding of a float32 candidate that is the average of the others
_SCHMIDT_FLOOR = 1e-12  # squared norm of the remainder of a candidate, relative to its own


def basis_class(name: BasisName) -> type[Basis]:
    """Return the class of the basis of this name."""
    match name:
        case "normalized":
            return Normalized
        case "orthonormal":
            return Orthonormal
        case "pca":
            return Pca
        case "simplex":
            return Simplex
        case _:
            assert_never(name)


def make_basis(config: TwaConfig, gram: torch.Tensor, center_weights: Sequence[float]) -> Basis:
    """Return the basis that `config` names.

    Args:
        config: names the basis, its units and its number of components.
        gram: (G, n + 1, n + 1), float64.
        center_weights: b, n numbers of sum 1.

    Raises:
        ConfigError: `num_components` is larger than the number of directions of the candidates.
    """
    return basis_class(config.basis).make(config, gram, torch.tensor(center_weights, dtype=torch.float64))


class LinearBasis(Basis):
    """A basis with a matrix for each group: u = T x + offset.

    Args:
        gram: (G, n + 1, n + 1), float64.
        center_weights: b (n,), float64.
        units: `delta` multiplies T by the group's mean delta norm, `weight` does not.
        num_components: the largest number of columns of T; None for all.

    Raises:
        ConfigError: `num_components` is larger than the number of directions of the candidates.
    """

    from_origin: ClassVar[bool] = False
    """Whether x are coordinates from the origin: x = 0 is w = 0, and the center is one of the directions."""

    def __init__(
        self,
        gram: torch.Tensor,
        center_weights: torch.Tensor,
        *,
        units: str = "weight",
        num_components: int | None = None,
    ) -> None:
        super().__init__(gram, center_weights)
        n = gram.shape[1] - 1
        columns = [self.directions(of_group, num_components) for of_group in gram]
        k = max(max(c.shape[1] for c in columns), 1)
        if num_components is not None and k < num_components:
            raise ConfigError(
                f"num_components: {num_components} is set, but {n} candidates have only {k} directions that are not "
                f"numerically zero; use at most {k}."
            )
        matrix = torch.stack([torch.nn.functional.pad(c, (0, k - c.shape[1])) for c in columns])
        if units == "delta":
            norms = gram.diagonal(dim1=1, dim2=2)[:, :-1].clamp(min=0).sqrt()
            matrix = matrix * norms.mean(1)[:, None, None]
        self.matrix = matrix
        """T: (G, n + 1, k), float64. Columns beyond a group's own rank are zero."""
        self.offset = gram.new_zeros(n + 1, len(gram))
        """The offset, (n + 1, G), float64."""
        if self.from_origin:  # a group that is equal in all candidates has no direction and stays at the center
            self.offset[-1] = -matrix.any(dim=2).any(dim=1).to(gram.dtype)

    @classmethod
    def make(cls, config: TwaConfig, gram: torch.Tensor, center_weights: torch.Tensor) -> Self:
        """Return the basis with the `units` and `num_components` of `config`."""
        return cls(gram, center_weights, units=config.units, num_components=config.num_components)

    @staticmethod
    @abstractmethod
    def directions(gram: torch.Tensor, num_components: int | None) -> torch.Tensor:
        """Return T of one group, (n + 1, its rank), from its Gram matrix (n + 1, n + 1)."""

    def expand(self, x: torch.Tensor) -> torch.Tensor:
        """Return u = T x + offset."""
        u: torch.Tensor = torch.einsum("gik,kg->ig", self.matrix, x) + self.offset
        return u

    def locate(self, a: torch.Tensor) -> torch.Tensor:
        """Return the least-squares solution of T x + offset = u(a) in the metric of the Gram matrix."""
        target = self.weights_of(a) - self.offset
        if not target.any():  # the center of a centered basis; the pseudo-inverse is slow for many candidates
            return target.new_zeros(self.matrix.shape[2], target.shape[1])
        normal = self.matrix.mT @ self.gram @ self.matrix
        rhs = torch.einsum("gik,gij,jg->gk", self.matrix, self.gram, target)
        inverse: torch.Tensor = torch.linalg.pinv(normal, rtol=1e-12, hermitian=True)
        return (inverse @ rhs[..., None])[..., 0].T.contiguous()


class Normalized(LinearBasis):
    """Each delta divided by its norm (TWA, journal version): T = diag(1 / ||delta_i||)."""

    norms_only = True

    @staticmethod
    def directions(gram: torch.Tensor, num_components: int | None) -> torch.Tensor:
        """Return T; the column of a delta that is zero up to rounding is zero."""
        n = len(gram) - 1
        norms = gram.diagonal().clamp(min=0).sqrt()
        floor = max(_RELATIVE_FLOOR * norms[:n].max(), _ROUNDING * norms[n])
        norms = norms[:n]
        inverse = torch.where(norms > floor, 1 / norms, torch.zeros_like(norms))
        return torch.cat([torch.diag(inverse), gram.new_zeros(1, n)])


class Orthonormal(LinearBasis):
    """The Gram-Schmidt basis of the candidates themselves (TWA, ICLR 2023, Algorithm 1)."""

    needs_center = True
    from_origin = True

    @staticmethod
    def directions(gram: torch.Tensor, num_components: int | None) -> torch.Tensor:
        """Orthonormalize w_i = c + delta_i in the order i = 1, .., n; drop candidates that depend on earlier ones."""
        n = len(gram) - 1
        basis, rank = gram.new_zeros(n + 1, n), 0
        for i in range(n):
            vector = gram.new_zeros(n + 1)
            vector[i] = vector[n] = 1.0
            original = vector @ gram @ vector
            earlier = basis[:, :rank]
            for _ in range(2):  # the second sweep removes rounding errors of the first
                vector = vector - earlier @ (earlier.T @ (gram @ vector))
            rest = vector @ gram @ vector
            if rest > _SCHMIDT_FLOOR * original:
                basis[:, rank] = vector / rest.sqrt()
                rank += 1
        return basis[:, :rank]


class Pca(LinearBasis):
    """The leading directions of the candidates around their mean (DLDR, arXiv 2103.11154)."""

    @staticmethod
    def directions(gram: torch.Tensor, num_components: int | None) -> torch.Tensor:
        """Return T = H V L^(-1/2) with H G H = V L V^T, H the centering at the mean: unit norms, largest first."""
        n = len(gram) - 1
        centering = torch.eye(n, dtype=gram.dtype, device=gram.device) - 1 / n
        values, vectors = torch.linalg.eigh(centering @ gram[:n, :n] @ centering)
        values, vectors = values.flip(0), vectors.flip(1)
        rank = int((values > _EIGENVALUE_FLOOR * values[0].clamp(min=0)).sum()) if values[0] > 0 else 0
        rank = min(rank, n - 1, num_components or n)
        vectors = vectors[:, :rank]
        # The sign of an eigenvector is arbitrary. Fix it, so that a resumed run has the same directions.
        signs = vectors.gather(0, vectors.abs().argmax(0, keepdim=True)).sign()
        directions = centering @ (vectors * signs) / values[:rank].sqrt()
        return torch.cat([directions, gram.new_zeros(1, rank)])


class Simplex(Basis):
    """Softmax weights of the deltas (learned soup): u = softmax(x)."""

    norms_only = True

    @classmethod
    def check(cls, config: TwaConfig, center_weights: Sequence[float]) -> None:
        """Check that the start is not at the boundary.

        Raises:
            ConfigError: a candidate has no weight in the start or in the center.
        """
        if config.start != "center" or min(center_weights) <= 0:
            raise ConfigError(
                "basis 'simplex' must start where every candidate has a positive weight: at its corners and edges the "
                "softmax has no gradient. Choose start: center, and a center that uses all candidates."
            )

    def expand(self, x: torch.Tensor) -> torch.Tensor:
        """Return softmax(x), and 0 for the center."""
        weights = torch.softmax(x, dim=0)
        return torch.cat([weights, weights.new_zeros(1, weights.shape[1])])

    def can_start_at(self, a: torch.Tensor) -> bool:
        """Return whether a is in the interior: the softmax has no gradient at corners and edges."""
        return bool((a > 0).all())

    def locate(self, a: torch.Tensor) -> torch.Tensor:
        """Return log(a), which is finite if `can_start_at` returns True."""
        return torch.log(a)
