"""The optimizer of the coefficients, and what could not be trained."""

from collections.abc import Callable, Sequence

import torch
from torch import nn

from twa_scale.config import TwaConfig, candidate_index
from twa_scale.errors import ConfigError


def check_settings(config: TwaConfig, center_weights: Sequence[float]) -> None:
    """Find what could not be trained before any candidate is read.

    Raises:
        ConfigError: a start or a number of components that cannot be.
    """
    n = len(center_weights)
    if config.start != "center":
        candidate_index(config.start, n, "start")
    if config.basis == "simplex" and (config.start != "center" or min(center_weights) <= 0):
        raise ConfigError(
            "basis 'simplex' must start where every candidate has a positive weight: at its corners and edges the "
            "softmax has no gradient. Choose start: center, and a center that uses all candidates."
        )
    if config.num_components is not None and config.num_components >= n:
        raise ConfigError(
            f"num_components: {config.num_components} asked for, but {n} candidates span at most {n - 1} directions."
        )


def check_optimizer(config: TwaConfig) -> None:
    """Find options that torch refuses, before anything is opened.

    Raises:
        ConfigError: as `make_optimizer` does.
    """
    make_optimizer(config, nn.Parameter(torch.zeros(1, 1)))


def make_optimizer(config: TwaConfig, x: nn.Parameter) -> torch.optim.Optimizer:
    """Build the optimizer of the coefficients by its name in torch.optim.

    Raises:
        ConfigError: a class that this torch does not have, or options that it does not take.
    """
    known: dict[str, Callable[..., torch.optim.Optimizer]] = {
        name.lower(): value for name, value in vars(torch.optim).items() if isinstance(value, type)
    }
    settings = config.optimizer
    if settings.name.lower() not in known:
        raise ConfigError(f"optimizer.name: torch {torch.__version__} has no {settings.name!r}; use adamw or sgd.")
    try:
        return known[settings.name.lower()]([x], lr=settings.lr, **settings.options)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"optimizer: {settings.name} refuses these options: {error}.") from error
