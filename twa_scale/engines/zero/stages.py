"""Selection of the engine for a DeepSpeedEngine."""

import sys
from typing import Any, TypeGuard

from twa_scale.engines.zero.base import ZeroEngine
from twa_scale.engines.zero.deepspeed_settings import check_supported
from twa_scale.engines.zero.stage3 import Zero3Engine
from twa_scale.engines.zero.stage12 import Zero12Engine
from twa_scale.ranks import Group


def is_deepspeed(model: object) -> TypeGuard[Any]:
    """Return whether `model` is the engine that `deepspeed.initialize` returned."""
    deepspeed: Any = sys.modules.get("deepspeed")  # a user who has such an engine has imported it
    return deepspeed is not None and isinstance(model, deepspeed.DeepSpeedEngine)


def zero_engine(model: Any, replica_group: Group) -> ZeroEngine:
    """Return the engine for a DeepSpeedEngine.

    Raises:
        EngineError: the stage, the optimizer wrapper or the kind of parallelism is not supported.
    """
    check_supported(model)
    stage3 = model.zero_optimization_stage() == 3
    return Zero3Engine(model, replica_group) if stage3 else Zero12Engine(model, replica_group)
