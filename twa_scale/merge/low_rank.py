"""Averages of the products of LoRA adapters, truncated to a rank."""

from collections.abc import Sequence
from typing import cast

from twa_scale.candidates import Candidate
from twa_scale.candidates.adapters import Concatenated, Truncated, Truncation, relative_error
from twa_scale.errors import ConfigError
from twa_scale.ranks import Group


def truncated(candidates: Sequence[Candidate], weights: Sequence[float], rank: int) -> Truncated:
    """Return the average of the products of adapters, truncated to `rank`.

    Raises:
        ConfigError: `rank` is not positive, or the candidates were not opened with `space: product`.
    """
    if rank < 1:
        raise ConfigError(f"--rank {rank}: a rank is at least 1.")
    if not all(isinstance(candidate, Concatenated) for candidate in candidates):
        raise ConfigError("--rank: only products can be truncated to a rank; add --space product (space='product').")
    return Truncated(cast("Sequence[Concatenated]", candidates), weights, rank)


def truncation_line(low: Truncated, rank: int, group: Group) -> str:
    """Return a line that reports the relative error of the truncation. Collective."""
    by_module: dict[str, Truncation] = {}
    for rank_truncations in group.gather(low.truncations):
        by_module |= rank_truncations
    worst = max(by_module, key=lambda module: relative_error([by_module[module]]))
    return (
        f"rank {rank}: the products differ from their exact average, of rank {max(low.exact_ranks.values())}, by "
        f"{relative_error(list(by_module.values())):.3g} of its norm, most in {worst!r} "
        f"({relative_error([by_module[worst]]):.3g})."
    )
