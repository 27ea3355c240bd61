"""DeepSpeed ZeRO-1, 2 and 3: the engines of a `deepspeed.DeepSpeedEngine`. Imports no DeepSpeed by itself."""

from twa_scale.engines.zero.choose import is_deepspeed, zero_engine
from twa_scale.engines.zero.settings import settings_of, stateless_optimizer

__all__ = ["is_deepspeed", "settings_of", "stateless_optimizer", "zero_engine"]
