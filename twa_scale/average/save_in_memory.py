"""Save the coefficients, moments and buffers of a training in memory, and restore them."""

from collections.abc import Callable
from copy import deepcopy

from twa_scale.average.step_optimizer import AverageOptimizer
from twa_scale.average.written import WrittenCoefficients
from twa_scale.engines import Engine


def save_in_memory(engine: Engine, written: WrittenCoefficients, optimizer: AverageOptimizer) -> Callable[[], None]:
    """Return a function that restores the current coefficients, moments and buffers, and writes the weights.

    The function is collective. It also restores the counters and the loss scale of DeepSpeed.
    """
    saved = written.saved()
    inner, rows = optimizer.inner_states()
    buffers = {name: buffer.clone() for name, buffer in engine.buffers().items()}
    counters = engine.counters()
    keys = [set(group) for group in optimizer.param_groups]

    def restore() -> None:
        written.set(saved.x, saved.rows)
        optimizer.load_inner(inner, deepcopy(rows))
        live = engine.buffers()
        for name, value in buffers.items():
            live[name].copy_(value)
        counters()
        for group, known in zip(optimizer.param_groups, keys, strict=True):
            for added in group.keys() - known:  # keys added by schedulers
                del group[added]

    return restore
