"""Numbers that describe an average: its effective number of candidates, and the elements of its groups."""

from collections.abc import Mapping, Sequence
from math import prod

import torch

COEFFICIENTS = "coefficients/"
"""The prefix of the mean averaging coefficient of each candidate, among the values of `described`."""
EFFECTIVE, DISTANCE = "effective_candidates", "distance"


def elements_of_groups(
    num_groups: int, groups_of: Mapping[str, Sequence[int]], shapes: Mapping[str, Sequence[int]]
) -> list[int]:
    """Return the number of elements of each group.

    Args:
        num_groups: the number of groups, G.
        groups_of: the groups of the equal parts of each trained tensor, by its name: one for most tensors.
        shapes: the shapes of tensors, by the same names.
    """
    elements = [0] * num_groups
    for name, groups in groups_of.items():
        for group in groups:
            elements[group] += prod(shapes[name]) // len(groups)
    return elements


def mean_coefficients(a: torch.Tensor, elements: Sequence[int]) -> torch.Tensor:
    """Return the mean of the averaging coefficients over the elements, (n,) float64.

    Args:
        a: the averaging coefficients, (n, G).
        elements: the number of elements of each group.
    """
    return a.to(torch.float64) @ _shares(elements)


def effective_candidates(a: torch.Tensor, elements: Sequence[int]) -> float:
    """Return the number of candidates whose uniform mean reduces independent noise of the candidates as much.

    For one group it is (sum_i a_i)^2 / sum_i a_i^2: n for the uniform mean, 1 for a single candidate, and less than 1
    if large coefficients of both signs amplify the noise. For several groups it is the harmonic mean over elements.

    Args:
        a: the averaging coefficients, (n, G).
        elements: the number of elements of each group.

    Returns:
        The number; 0 if the coefficients of a group sum to zero.
    """
    a = a.to(torch.float64)
    noise = a.square().sum(0) / a.sum(0).square()
    # A group without elements, 0 * inf, does not contribute.
    mean = float(torch.nan_to_num(noise * _shares(elements), nan=0.0, posinf=torch.inf).sum())
    return 1 / mean if mean else 0.0


def described(a: torch.Tensor, elements: Sequence[int]) -> dict[str, float]:
    """Return values to log: the effective number of candidates, and the mean coefficient of each over the elements.

    Args:
        a: the averaging coefficients, (n, G).
        elements: the number of elements of each group.
    """
    means = mean_coefficients(a, elements).tolist()
    digits = len(str(len(means) - 1))
    named = {f"{COEFFICIENTS}{i:0{digits}}": mean for i, mean in enumerate(means)}
    return {EFFECTIVE: effective_candidates(a, elements), **named}


def _shares(elements: Sequence[int]) -> torch.Tensor:
    """Return the fraction of all elements that each group has, (G,) float64."""
    counts = torch.tensor(elements, dtype=torch.float64)
    return counts / counts.sum().clamp(min=1)
