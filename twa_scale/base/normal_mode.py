"""A decorator for functions that leave `torch.inference_mode` and the user's default device."""

from collections.abc import Callable
from contextlib import ExitStack
from functools import wraps
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


def in_normal_mode(function: Callable[P, R]) -> Callable[P, R]:
    """Make a function leave `torch.inference_mode`, whose tensors could not be trained or written afterwards.

    It also leaves a default device of the user (`torch.set_default_device`): small tensors are made on the CPU.
    """

    @wraps(function)
    def outside(*args: P.args, **kwargs: P.kwargs) -> R:
        with ExitStack() as modes:
            if torch.is_inference_mode_enabled():
                modes.enter_context(torch.inference_mode(False))
            # A new tensor shows the default device: in a `with torch.device`, get_default_device of torch 2.6 is wrong.
            if torch.empty(0).device.type != "cpu":
                modes.enter_context(torch.device("cpu"))
            return function(*args, **kwargs)

    return outside
