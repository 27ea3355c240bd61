"""The memory of `RunningAverages` in a training of the model of a configuration."""

from collections.abc import Mapping
from math import prod
from typing import Any

import torch

from twa_scale.base.names import nearest
from twa_scale.config import RunConfig
from twa_scale.engines.complex_weights import real_view
from twa_scale.engines.parameters import named_parameters, persistent_buffers
from twa_scale.errors import ConfigError
from twa_scale.ranks import World
from twa_scale.run.engines import run_engine
from twa_scale.run.tasks import build_task
from twa_scale.running.ema import averaging_dtype
from twa_scale.running.settings import ema_settings, window_settings
from twa_scale.running.window import kept_buffers
from twa_scale.store import store_bytes


def averages_bytes(config: RunConfig, ranks: int, settings: Mapping[str, Any]) -> dict[str, int]:
    """Return the bytes of running averages on the rank with the most bytes, by description. No candidate is opened.

    Args:
        config: the configuration, with the model in its task, and the engine.
        ranks: the number of ranks that share the model.
        settings: `ema` and `window`, as for `RunningAverages`.

    Raises:
        ConfigError: settings are invalid.
    """
    if unknown := [key for key in settings if key not in ("ema", "window")]:
        hint = nearest(str(unknown[0]), ("ema", "window")) or "."
        raise ConfigError(f"--averages: unknown key {unknown[0]!r}{hint} Give ema, window, or both.")
    ema, window = ema_settings(settings.get("ema")), window_settings(settings.get("window"))
    if ema is None and window is None:
        raise ConfigError(
            "--averages: give ema, as {ema: 0.999}, window, as {window: {every: 100, keep: 40}}, or both."
        )
    engine = run_engine(config, World(rank=0, size=ranks, local_rank=0))
    with torch.device("meta"):
        model = build_task(config.task).model()
    _, parameters = named_parameters(model)
    trained = [info for info in parameters.values() if info.trainable and info.dtype.is_floating_point]
    sizes = {info.name: engine.owned_elements(info) for info in trained}
    buffers = {name: real_view(buffer) for name, buffer in persistent_buffers(model).items()}
    result: dict[str, int] = {}
    if ema:
        elements = sum(
            sizes[info.name] * averaging_dtype(torch.empty(0, dtype=info.dtype)).itemsize for info in trained
        )
        result[f"exponential averages ({', '.join(ema.stored_names())})"] = len(ema.stored_names()) * elements
        if ema.use_buffers:
            buffer_bytes = sum(prod(buffer.shape) * buffer.element_size() for buffer in buffers.values())
            result["their buffers, on the first rank"] = len(list(ema.names())) * buffer_bytes
    if window:
        name = f"window of {window.keep} snapshots ({window.store})"
        result[name] = store_bytes(window.store, window.keep - 1, sizes.values())
        buffer_bytes = sum(
            count * prod(buffers[name].shape) * buffers[name].element_size()
            for name, count in kept_buffers(buffers, window.keep).items()
        )
        result |= {"buffers of the snapshots, on the first rank": buffer_bytes} if buffer_bytes else {}
    result["the weights, while others are shown"] = sum(sizes[info.name] * info.dtype.itemsize for info in trained)
    return result
