"""Settings that lie in another program's JSON: the top-level "twa" block of a DeepSpeed configuration."""

from collections.abc import Mapping
from typing import Any

from twa_scale.config.schema import RunConfig, TwaConfig
from twa_scale.errors import ConfigError

BLOCK = "twa"


def block_settings(block: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Return the candidates of a block (None where it has none) and the fields of TwaConfig in it.

    Keys of a whole run are left to `twa-scale run`; keys that nobody knows stay, to be refused.

    Raises:
        ConfigError: a block that is no mapping.
    """
    if not isinstance(block, Mapping):
        raise ConfigError(f'"{BLOCK}" holds {type(block).__name__}, not a mapping of keys to values.')
    own = {k: v for k, v in block.items() if k in TwaConfig.model_fields or k not in RunConfig.model_fields}
    return block.get("candidates"), own


def unfolded(data: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a run that stand in DeepSpeed's JSON; the rest of it becomes their `deepspeed`.

    Raises:
        ConfigError: a block that is no mapping, or ZeRO of no stage.
    """
    block_settings(data[BLOCK])
    rest = {key: value for key, value in data.items() if key != BLOCK}
    zero = rest.get("zero_optimization")
    stage = zero.get("stage", 0) if isinstance(zero, Mapping) else 0
    if stage not in (1, 2, 3):
        raise ConfigError(f"zero_optimization.stage is {stage}: give 1, 2 or 3.")
    return {"engine": f"zero{stage}", **data[BLOCK], "deepspeed": rest}
