"""From the Gram matrix of the deltas to the small matrix T that says what the coefficients multiply.

Everything here is of size n: the weights of a group are w = (1 + u_c) c + sum_i u_i delta_i, and a basis is a map from
coefficients x to u = T x + offset (or to softmax(x)). Rows of u, T and the Gram matrix: the n deltas, then the center.
"""

from dataclasses import dataclass

import torch

from twa_scale.errors import ConfigError

_EIGENVALUE_FLOOR = 1e-10  # of the largest; below it a direction of float32 deltas is rounding noise
_RELATIVE_FLOOR = 1e-6  # of the largest delta norm
_ROUNDING = 1e-7  # of the center's norm: what float32 makes of a candidate that is itself the average of the others
_SCHMIDT_FLOOR = 1e-12  # squared norm of what Schmidt leaves of a candidate, of its own


class Gram:
    """Inner products of deltas and center per group, in float64: (G, n + 1, n + 1).

    Args:
        num_groups: G.
        n: candidates.
        device: of the deltas.
        diagonal: form the squared norms only, and leave the other products zero.
    """

    def __init__(self, num_groups: int, n: int, device: torch.device, *, diagonal: bool = False) -> None:
        self._diagonal = diagonal
        self.values = torch.zeros(num_groups, n + 1, n + 1, dtype=torch.float64, device=device)

    def of(self, group: int) -> torch.Tensor:
        """Return what the products of a group's elements are added to: (n + 1, n + 1), or the diagonal (n + 1,)."""
        return self.values[group].diagonal() if self._diagonal else self.values[group]


def needs_norms_only(kind: str) -> bool:
    """Return whether the diagonal of the Gram matrix is all that a basis is made of."""
    return kind in ("normalized", "simplex")


@dataclass(frozen=True)
class Basis:
    """The map from coefficients x (k, G) to the weights u (n + 1, G) of the deltas and the center."""

    kind: str
    matrix: torch.Tensor
    """T: (G, n + 1, k), float64. Columns beyond a group's own rank are zero. The identity for the simplex."""
    offset: torch.Tensor
    """(n + 1, G), float64: -1 for the center of a group whose basis spans the candidates themselves."""
    center_weights: torch.Tensor
    """b: (n,), float64."""
    gram: torch.Tensor
    """(G, n + 1, n + 1), float64; only its diagonal where the basis needs no more."""

    @property
    def needs_center(self) -> bool:
        """Whether the gradient along the center itself moves a coefficient."""
        return self.kind == "orthonormal"

    def expand(self, x: torch.Tensor) -> torch.Tensor:
        """Return u (n + 1, G) for x (k, G); differentiable."""
        if self.kind == "simplex":
            weights = torch.softmax(x, dim=0)
            return torch.cat([weights, weights.new_zeros(1, weights.shape[1])])
        u: torch.Tensor = torch.einsum("gik,kg->ig", self.matrix, x) + self.offset
        return u

    def averaging(self, u: torch.Tensor) -> torch.Tensor:
        """Return what a user reads: a (n, G) with w = sum_i a_i w_i, a_i = u_i + (1 + u_c - sum_j u_j) b_i."""
        return u[:-1] + (1 + u[-1] - u[:-1].sum(0)) * self.center_weights[:, None]

    def weights_of(self, a: torch.Tensor) -> torch.Tensor:
        """Return u (n + 1, G) that gives exactly sum_i a_i w_i for a (n, G), also where the a do not sum to 1."""
        # The center itself is at hand: summing it up from the deltas again would add their rounding.
        is_center = (a == self.center_weights[:, None]).all(0)
        return torch.cat([a.masked_fill(is_center, 0), a.sum(0, keepdim=True).masked_fill(is_center, 1) - 1])

    def locate(self, a: torch.Tensor) -> torch.Tensor:
        """Return x (k, G) whose weights come nearest to sum_i a_i w_i, for a (n, G)."""
        if self.kind == "simplex":
            assert bool((a > 0).all())  # the corners, which no finite x reaches, are refused before anything is read
            return torch.log(a)
        target = self.weights_of(a) - self.offset
        if not target.any():  # at the center of a centered basis; a pseudo-inverse takes a while with many candidates
            return target.new_zeros(self.matrix.shape[2], target.shape[1])
        normal = self.matrix.mT @ self.gram @ self.matrix
        right = torch.einsum("gik,gij,jg->gk", self.matrix, self.gram, target)
        inverse: torch.Tensor = torch.linalg.pinv(normal, rtol=1e-12, hermitian=True)
        return (inverse @ right[..., None])[..., 0].T.contiguous()


def make_basis(
    kind: str, gram: torch.Tensor, center_weights: torch.Tensor, *, units: str, num_components: int | None = None
) -> Basis:
    """Choose T for each group from its Gram matrix.

    `normalized` divides each delta by its norm (TWA v4), `orthonormal` is Schmidt's basis of the candidates themselves
    (TWA, ICLR 2023), `pca` the leading directions of the candidates around their mean (DLDR, arXiv 2103.11154),
    `simplex` has no T. With `units` "delta" T is scaled by the group's mean delta norm.

    Raises:
        ConfigError: more components asked for than the candidates have.
    """
    n = gram.shape[1] - 1
    match kind:
        case "normalized":
            columns = [_normalized(g) for g in gram]
        case "orthonormal":
            columns = [_schmidt(g) for g in gram]
        case "pca":
            columns = [_principal(g, num_components) for g in gram]
        case "simplex":
            columns = [torch.eye(n + 1, n, dtype=gram.dtype, device=gram.device) for _ in gram]
        case _:
            raise AssertionError(kind)
    k = max(max(c.shape[1] for c in columns), 1)
    if num_components is not None and k < num_components:
        raise ConfigError(
            f"num_components: {num_components} asked for, but {n} candidates have only {k} directions that are not "
            f"numerically zero; use at most {k}."
        )
    matrix = torch.stack([torch.nn.functional.pad(c, (0, k - c.shape[1])) for c in columns])
    if units == "delta" and kind != "simplex":
        norms = gram.diagonal(dim1=1, dim2=2)[:, :-1].clamp(min=0).sqrt()
        matrix = matrix * norms.mean(1)[:, None, None]
    offset = gram.new_zeros(n + 1, len(gram))
    if kind == "orthonormal":  # a group that is the same in all candidates has no scale, and stays at the center
        offset[-1] = -matrix.any(dim=2).any(dim=1).to(offset.dtype)
    return Basis(kind, matrix, offset, center_weights, gram)


def _normalized(gram: torch.Tensor) -> torch.Tensor:
    """T = diag(1 / ||delta_i||); a delta that is zero up to rounding is no direction."""
    n = len(gram) - 1
    norms = gram.diagonal().clamp(min=0).sqrt()
    floor = max(_RELATIVE_FLOOR * norms[:n].max(), _ROUNDING * norms[n])
    norms = norms[:n]
    inverse = torch.where(norms > floor, 1 / norms, torch.zeros_like(norms))
    return torch.cat([torch.diag(inverse), gram.new_zeros(1, n)])


def _schmidt(gram: torch.Tensor) -> torch.Tensor:
    """Orthonormalize w_1, .., w_n, where w_i = c + delta_i, in this order; what depends on earlier ones is dropped."""
    n = len(gram) - 1
    basis, rank = gram.new_zeros(n + 1, n), 0
    for i in range(n):
        vector = gram.new_zeros(n + 1)
        vector[i] = vector[n] = 1.0
        original = vector @ gram @ vector
        earlier = basis[:, :rank]
        for _ in range(2):  # the second sweep removes what rounding left of the first
            vector = vector - earlier @ (earlier.T @ (gram @ vector))
        rest = vector @ gram @ vector
        if rest > _SCHMIDT_FLOOR * original:
            basis[:, rank] = vector / rest.sqrt()
            rank += 1
    return basis[:, :rank]


def _principal(gram: torch.Tensor, num_components: int | None) -> torch.Tensor:
    """T = H V L^(-1/2) with H G H = V L V^T, H the centering at the mean: unit-norm directions, largest first."""
    n = len(gram) - 1
    centering = torch.eye(n, dtype=gram.dtype, device=gram.device) - 1 / n
    values, vectors = torch.linalg.eigh(centering @ gram[:n, :n] @ centering)
    values, vectors = values.flip(0), vectors.flip(1)
    rank = int((values > _EIGENVALUE_FLOOR * values[0].clamp(min=0)).sum()) if values[0] > 0 else 0
    rank = min(rank, n - 1, num_components or n)
    vectors = vectors[:, :rank]
    # An eigenvector's sign is arbitrary; fix it, so that a resumed run continues on the same side.
    signs = vectors.gather(0, vectors.abs().argmax(0, keepdim=True)).sign()
    directions = centering @ (vectors * signs) / values[:rank].sqrt()
    return torch.cat([directions, gram.new_zeros(1, rank)])
