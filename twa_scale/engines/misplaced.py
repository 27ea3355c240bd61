"""Models that a user may have attached to by mistake."""

import gc
from itertools import chain

from torch import nn

from twa_scale.engines.plain import PlainEngine
from twa_scale.engines.protocol import Engine
from twa_scale.errors import EngineError


def require_memory(engine: Engine) -> None:
    """Refuse a model that has parameters or buffers without memory.

    Raises:
        EngineError: names the first on the meta device.
    """
    module = engine.module
    for name, tensor in chain(module.named_parameters(), module.named_buffers()):
        if tensor.is_meta:
            raise EngineError(
                f"{name!r} is on the meta device and has no memory that weights could be written to. Call "
                "model.to_empty(device=..) before attach, after sharding; attach fills in the candidates' values."
            )


def wrapper_beside(engine: Engine) -> str | None:
    """Name the class of what wraps a plain module that was attached to on several ranks, if anything does.

    Looks through all objects of this process.
    """
    if not isinstance(engine, PlainEngine) or engine.replica_group.size == 1:
        return None
    for thing in gc.get_objects():
        if issubclass(type(thing), nn.Module) and vars(thing).get("_modules", {}).get("module") is engine.module:
            return type(thing).__name__
    return None
