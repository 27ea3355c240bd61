"""Models that a user may have attached to by mistake."""

import gc
from itertools import chain

from torch import nn

from twa_scale.engines.engine import Engine
from twa_scale.engines.plain import PlainEngine
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


def require_device(engine: Engine) -> None:
    """Refuse a model whose weights are not on one CPU or GPU.

    Raises:
        EngineError: names the devices.
    """
    # By the weights: an engine of a user's own may give its device without a number.
    devices = {engine.live(span).device for span in engine.spans()} or {engine.device}
    if all(device.type != engine.device.type for device in devices):
        devices.add(engine.device)
    places = {str(device): device.type for device in devices}
    if unknown := [place for place, kind in places.items() if kind not in ("cpu", "cuda")]:
        raise EngineError(
            f"the model is on {unknown[0]}; an average can be trained on a CPU, and on GPUs of NVIDIA (CUDA) and AMD "
            "(ROCm). Move the model to the CPU before attach."
        )
    if len(places) > 1:
        raise EngineError(
            f"the model is spread over {' and '.join(sorted(places))}; the weights of a rank must be on one device. "
            "Load it without device_map, and shard it with fully_shard if it does not fit."
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
