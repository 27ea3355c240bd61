"""Check that the settings of adapters give their tensors the same meaning. Others have no average."""

from collections.abc import Sequence
from typing import Any

from twa_scale.base.inputs import brief
from twa_scale.candidates.adapters.adapter_config import AdapterConfig
from twa_scale.errors import CandidateError

# The base model or the tokens to which the tensors belong, and how modules compute with them.
_ALL_KINDS = (
    "alora_invocation_tokens",
    "arrow_config",
    "feedforward_modules",
    "kasa_config",
    "layer_replication",
    "monteclora_config",
    "qalora_group_size",
    "target_parameters",
    "token_indices",
    "trainable_token_indices",
    "use_bdlora",
    "use_dora",
    "use_qalora",
)
# For kinds other than LoRA also the scalings, which are not taken into account, and the inputs of tensors.
_NOT_LORA = (
    "alpha",
    "alpha_pattern",
    "apply_GS",
    "block_share",
    "coft",
    "group_size",
    "lora_alpha",
    "projection_prng_key",
    "r",
    "randlora_alpha",
    "random_loc_seed",
    "rank_pattern",
    "scaling",
    "topk",
    "use_effective_conv2d",
    "use_rslora",
    "variant",
)
_SETS = ("feedforward_modules", "target_parameters")  # PEFT saves these in any order


def require_same_meaning(configs: Sequence[AdapterConfig]) -> None:
    """Check that the settings of adapters of one kind give their tensors the same meaning.

    Args:
        configs: the configurations of all candidates; empty if these are not adapters.

    Raises:
        CandidateError: names the files, the setting and both values.
    """
    if not configs:
        return
    last = configs[-1]
    keys = _ALL_KINDS if last.kind == "LORA" else (*_ALL_KINDS, *_NOT_LORA)
    for config in configs[:-1]:
        for key, value, other in [
            *((key, _comparable(key, config.settings), _comparable(key, last.settings)) for key in keys),
            ("init_lora_weights", config.changes_base, last.changes_base),
            *_loftq(config, last),
        ]:
            if value != other:
                raise CandidateError(
                    f"{config.path}: {key} is {brief(config.settings.get(key))}, and "
                    f"{brief(last.settings.get(key))} in {last.path}. Tensors of such adapters mean different things, "
                    "so they have no average. Leave this adapter out, or merge each adapter into its base model "
                    "(merge_and_unload) and average the full weights."
                )


def _comparable(key: str, settings: Any) -> Any:
    """Return a setting for comparison. Versions of PEFT omit disabled settings, or save them as null or false."""
    value = settings.get(key) or None
    return sorted(map(str, value)) if key in _SETS and isinstance(value, list) else value


def _loftq(config: AdapterConfig, last: AdapterConfig) -> list[tuple[str, Any, Any]]:
    """Return the settings with which LoftQ quantizes the base weights."""
    if "loftq" not in (config.changes_base, last.changes_base):
        return []
    key = "loftq_config"
    return [(key, config.settings.get(key), last.settings.get(key))]
