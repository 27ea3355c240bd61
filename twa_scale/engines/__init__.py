"""Engines: one adapter for each sharding library, and the choice of the engine for a model."""

from twa_scale.engines.detect import choose_engine
from twa_scale.engines.engine import Consume, Engine, ParameterInfo

__all__ = ["Consume", "Engine", "ParameterInfo", "choose_engine"]
