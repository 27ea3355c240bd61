"""Read settings from the top-level "twa" block of a DeepSpeed configuration."""

from collections.abc import Mapping
from typing import Any

from twa_scale.config.average import TwaConfig
from twa_scale.config.run import RunConfig
from twa_scale.errors import ConfigError

BLOCK = "twa"


def block_settings(block: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Return the candidates of a block, or None, and its fields of TwaConfig.

    Other keys of RunConfig are removed. Unknown keys stay, so that validation refuses them.

    Raises:
        ConfigError: the block is not a mapping.
    """
    if not isinstance(block, Mapping):
        raise ConfigError(f'"{BLOCK}" holds {type(block).__name__}, not a mapping of keys to values.')
    settings = {k: v for k, v in block.items() if k in TwaConfig.model_fields or k not in RunConfig.model_fields}
    return block.get("candidates"), settings


def unfolded(data: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a run from a DeepSpeed configuration, with the rest of it as `deepspeed`.

    Raises:
        ConfigError: the block is not a mapping, or the ZeRO stage is not 1, 2 or 3.
    """
    block_settings(data[BLOCK])
    rest = {key: value for key, value in data.items() if key != BLOCK}
    zero = rest.get("zero_optimization")
    stage = zero.get("stage", 0) if isinstance(zero, Mapping) else 0
    if stage not in (1, 2, 3):
        raise ConfigError(f"zero_optimization.stage is {stage}: give 1, 2 or 3.")
    return {"engine": f"zero{stage}", **data[BLOCK], "deepspeed": rest}
