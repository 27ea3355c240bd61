"""What shards the model, one file each, and the choice between them."""

from twa_scale.engines.detect import choose_engine
from twa_scale.engines.engine import Consume, Engine, ParameterInfo

__all__ = ["Consume", "Engine", "ParameterInfo", "choose_engine"]
