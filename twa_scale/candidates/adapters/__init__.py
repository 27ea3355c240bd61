"""Adapters of PEFT as candidates. Start with `spaces.py`."""

from twa_scale.candidates.adapters.adapter_config import (
    ADAPTER_BASE,
    ADAPTER_CONFIG,
    PREFIX,
    AdapterConfig,
    adapter_config,
    with_ranks,
)
from twa_scale.candidates.adapters.concatenated import Concatenated, summed
from twa_scale.candidates.adapters.gram import products_gram
from twa_scale.candidates.adapters.lora_factors import Factors, factors_in
from twa_scale.candidates.adapters.spaces import Space, described, in_space, scalings
from twa_scale.candidates.adapters.truncated import Truncated, Truncation, ranks_of, relative_error

__all__ = [
    "ADAPTER_BASE",
    "ADAPTER_CONFIG",
    "PREFIX",
    "AdapterConfig",
    "Concatenated",
    "Factors",
    "Space",
    "Truncated",
    "Truncation",
    "adapter_config",
    "described",
    "factors_in",
    "in_space",
    "products_gram",
    "ranks_of",
    "relative_error",
    "scalings",
    "summed",
    "with_ranks",
]
