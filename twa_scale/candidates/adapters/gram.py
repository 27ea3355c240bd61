"""Inner products of the updates of adapters, computed from their factors without the full matrices."""

from collections.abc import Sequence

import torch

from twa_scale.candidates.adapters.concatenated import Concatenated, product_factors
from twa_scale.candidates.adapters.lora_factors import Factors
from twa_scale.errors import CandidateError


def products_gram(candidates: Sequence[Concatenated], factors: Sequence[Factors]) -> torch.Tensor:
    """Return sum over modules of <s_i B_i A_i, s_j B_j A_j>: (n, n), float64.

    With B = [s_i B_i] and A = [A_i] it is a sum over the blocks of (B^T B) * (A A^T), an R x R matrix.

    Args:
        candidates: adapters in the space of products.
        factors: the factors of the modules.

    Raises:
        CandidateError: a file cannot be read, or a value is NaN or Inf.
    """
    n = len(candidates)
    gram = torch.zeros(n, n, dtype=torch.float64)
    for pair in factors:
        a, b = product_factors(candidates, pair, [1.0] * n)
        owner = torch.zeros(n, a.shape[1], dtype=torch.float64)
        for i, candidate in enumerate(candidates):
            owner[i, slice(*candidate.owned[pair.module])] = 1
        products = ((b.mT @ b) * (a @ a.mT)).sum(0)
        if not torch.isfinite(products).all():
            finite = torch.isfinite(a).all(2).all(0) & torch.isfinite(b).all(1).all(0)
            wrong = owner @ (~finite).double()
            raise CandidateError(
                f"{candidates[int(wrong.argmax())].label}: the factors of {pair.module!r} hold NaN or Inf; weights "
                "must be finite. Leave this candidate out."
            )
        gram += owner @ products @ owner.T
    return gram
