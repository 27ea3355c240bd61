"""Scores that a function of the user returns on every rank."""

from numbers import Real
from typing import Any

import torch

from twa_scale.errors import ConfigError
from twa_scale.ranks import Pods, first_difference


def agreed_score(pods: Pods, value: Any, caller: str) -> float:
    """Return a score as a float, after a check that it is the same on every rank. Collective.

    Args:
        pods: all ranks.
        value: the score of this rank.
        caller: the function that needs the score, for messages.

    Raises:
        ConfigError: the score is not a number, or differs between ranks; on every rank.
    """
    with pods.agree():
        value = _number(value, caller)
    other = first_difference(pods, {"score": value})
    with pods.agree():
        if other:
            raise ConfigError(
                f"{caller}: the score is {other.local} on {other.location} and {other.first} on "
                f"{other.first_location}. Sum it over the ranks, for example with torch.distributed.all_reduce."
            )
    return float(value)


def _number(value: Any, caller: str) -> float:
    """Return a score as a float.

    Raises:
        ConfigError: it is not a number.
    """
    if isinstance(value, torch.Tensor) and value.numel() == 1:
        return float(value.item())
    if isinstance(value, bool) or not isinstance(value, Real):
        raise ConfigError(f"{caller}: the score is {value!r}; return a number.")
    return float(value)
