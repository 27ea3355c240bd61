"""Checks that a model can be attached to."""

import gc
from itertools import chain

from torch import nn

from twa_scale.engines.engine import Engine
from twa_scale.engines.plain import PlainEngine
from twa_scale.engines.view import underlying
from twa_scale.errors import EngineError
from twa_scale.ranks import Pods, first_difference


def require_materialized(engine: Engine) -> None:
    """Check that no parameter or buffer is on the meta device.

    Raises:
        EngineError: names the first tensor on the meta device.
    """
    module = engine.module
    for name, tensor in chain(module.named_parameters(), module.named_buffers()):
        if tensor.is_meta:
            raise EngineError(
                f"{name!r} is on the meta device and has no memory for weights. Call model.to_empty(device=...) after "
                "sharding and before attach; attach writes the candidates' values."
            )


def require_same_model(engine: Engine, pods: Pods) -> None:
    """Check that all ranks have the same parameters in the same order, and those of a pod the same engine. Collective.

    Otherwise they would add products of different tensors: groups of coefficients are counted in the model's order.

    Raises:
        EngineError: names the rank and the parameter; on every rank.
    """
    entries: dict[str, object] = {}
    for i, info in enumerate(engine.parameters.values()):
        kind = str(info.dtype).removeprefix("torch.")
        is_trainable = "requires a gradient" if info.trainable else "requires no gradient"
        entries[f"parameter {i}"] = f"{info.name!r} of shape {info.shape} and type {kind} ({is_trainable})"
    differences = (
        first_difference(engine.shard_group, {"engine": type(engine).__name__}),
        first_difference(pods, entries),
    )
    with pods.agree():
        if other := next(filter(None, differences), None):
            raise EngineError(
                f"{other.key}: {other.location} has {other.local} and {other.first_location} has {other.first}. Attach "
                "to the same model on every rank: same wrapper, parameters, order, types and requires_grad."
            )


def require_device(engine: Engine) -> None:
    """Check that the weights of this rank are on one CPU or GPU.

    Raises:
        EngineError: names the devices.
    """
    # The devices of the weights are compared because the device of a custom engine may have no index.
    devices = {engine.live(span).device for span in engine.spans()} or {engine.device}
    if all(device.type != engine.device.type for device in devices):
        devices.add(engine.device)
    kind_of = {str(device): device.type for device in devices}
    if unknown := [device for device, kind in kind_of.items() if kind not in ("cpu", "cuda")]:
        raise EngineError(
            f"the model is on {unknown[0]}; an average can be trained on CPUs and on GPUs with CUDA or ROCm. Move the "
            "model to the CPU before attach."
        )
    if len(kind_of) > 1:
        raise EngineError(
            f"the model is divided over {' and '.join(sorted(kind_of))}; the weights of a rank must be on one device. "
            "Load it without device_map, and shard it with fully_shard if it does not fit."
        )


def enclosing_wrapper(engine: Engine) -> str | None:
    """Return the class name of a wrapper around a plain module that is attached on several ranks, or None.

    The function searches all objects of this process.
    """
    engine = underlying(engine)
    if not isinstance(engine, PlainEngine) or engine.replica_group.size == 1:
        return None
    for instance in gc.get_objects():
        if issubclass(type(instance), nn.Module) and vars(instance).get("_modules", {}).get("module") is engine.module:
            return type(instance).__name__
    return None
