"""Engines for DeepSpeed ZeRO-1, 2 and 3. The package does not import DeepSpeed."""

from twa_scale.engines.zero.deepspeed_settings import settings_of, stateless_optimizer
from twa_scale.engines.zero.stages import is_deepspeed, zero_engine

__all__ = ["is_deepspeed", "settings_of", "stateless_optimizer", "zero_engine"]
