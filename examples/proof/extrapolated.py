"""Averages of candidates that go on in the direction of training: their coefficients are not all positive."""

from collections.abc import Mapping
from itertools import product
from typing import Any

import torch

from twa_scale.running.settings import BemaSettings


def extra_merge(num: int, lengths: list[int], multiples: list[float]) -> dict[str, torch.Tensor]:
    """Return coefficients of the last mean plus multiples of its difference from the mean of as many candidates before.

    After Extra-Merge (arXiv 2605.26484), which goes on along the line of two successive merges.

    Args:
        num: the number of candidates, the last one of training last.
        lengths: how many candidates a mean has, at most half of `num`.
        multiples: of the difference.
    """
    options = {}
    for length, multiple in product(lengths, multiples):
        last, before = torch.zeros(num), torch.zeros(num)
        last[num - length :] = before[num - 2 * length : num - length] = 1 / length
        options[f"{multiple} past the last {length}"] = last + multiple * (last - before)
    return options


def bema(num: int, every: int, bias_powers: list[float]) -> dict[str, torch.Tensor]:
    """Return coefficients of BEMA (arXiv 2508.00180, Algorithm 1) whose burn-in ends at the first candidate.

    Args:
        num: the number of candidates, the last one of training last.
        every: the steps between two candidates: BEMA is updated as often.
        bias_powers: the exponents eta of the bias correction.
    """
    options = {}
    for power in bias_powers:
        settings = BemaSettings(bias_power=power)
        average, single = torch.eye(num)[0], torch.eye(num)
        for i in range(1, num):
            average = average + settings.beta(i * every) * (single[i] - average)
        options[f"power {power}"] = average + settings.alpha((num - 1) * every) * (single[-1] - single[0])
    return options


def options(method: Mapping[str, Any], num: int, every: int) -> dict[str, torch.Tensor]:
    """Return what a method of methods.yaml chooses from: coefficients of shape `(num,)` by name."""
    if method["how"] == "extra-merge":
        return extra_merge(num, method["last"], method["multiples"])
    return bema(num, every, method["bias_powers"])
