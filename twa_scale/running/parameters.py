"""The weights and buffers of a model that are averaged, with checks that they are not replaced."""

import torch

from twa_scale.base.names import quoted
from twa_scale.base.notices import notice
from twa_scale.base.spans import Span
from twa_scale.engines import Engine
from twa_scale.engines.model_checks import enclosing_wrapper
from twa_scale.errors import ConfigError, EngineError
from twa_scale.ranks import Pods
from twa_scale.store.host_memory import PinnedMemory


class Parameters:
    """The floating point parameters that require a gradient when this object is created, and the persistent buffers.

    Args:
        engine: holds the model.
        pods: all ranks.
        device: "auto" or "cpu": the device of the averages.
        with_buffers: whether the averages hold buffers, so that buffers may not be replaced.

    Raises:
        ConfigError: no parameter requires a gradient.
    """

    def __init__(self, engine: Engine, pods: Pods, device: str, *, with_buffers: bool) -> None:
        self._engine = engine
        self._pods = pods
        self._in_host_memory = device == "cpu" and engine.device.type != "cpu"
        self._pages = PinnedMemory(engine.device)
        self.names = _trained_names(engine)
        self._spans = [span for span in engine.spans() if span.name in self.names and len(span)]
        self._known_buffers = _described(engine.buffers()) if with_buffers else None
        self._required = self._require_gradients()
        self._reported = False
        self._wrapper_checks_left = 2

    def live(self) -> dict[Span, torch.Tensor]:
        """Return the weights of this rank by span, without a copy and without empty spans."""
        return {span: self._engine.live(span) for span in self._spans}

    def buffers(self) -> dict[str, torch.Tensor]:
        """Return the buffers of the model.

        Raises:
            EngineError: the averages hold buffers, and the buffers of the model have changed in type, shape or name.
        """
        buffers = self._engine.buffers()
        if self._known_buffers is None:
            return buffers
        known, current = self._known_buffers, _described(buffers)
        for name in (*known, *(name for name in current if name not in known)):
            before, after = known.get(name, "absent"), current.get(name, "absent")
            if before != after:
                raise EngineError(
                    f"buffer {name!r} was {before} when RunningAverages was created, and is {after} now. Register "
                    "buffers before, with persistent=False if they are not part of the model's state, or leave out "
                    "window and use_buffers."
                )
        return buffers

    def allocate(self, count: int, dtype: torch.dtype) -> torch.Tensor:
        """Return zeros on the device of the averages."""
        if self._in_host_memory:
            return self._pages.zeros(count, dtype=dtype, device=torch.device("cpu"))
        return torch.zeros(count, dtype=dtype, device=self._engine.device)

    def versions(self) -> dict[str, object]:
        """Return a value for each parameter of this rank that changes when torch writes the parameter.

        Raises:
            EngineError: a parameter was replaced.
        """
        return self._engine.changed(self.names)

    @torch.no_grad()
    def publish(self) -> None:
        """Make writes to the tensors of `live` visible to the next forward pass. Collective."""
        self._engine.publish(self.names)

    def report_newly_trained(self) -> None:
        """Report once the parameters that require a gradient now and did not when this object was created."""
        if self._reported or not (more := self._require_gradients() - self._required):
            return
        self._reported = True
        if self._pods.rank == 0:
            notice(
                f"{len(more)} more parameters require a gradient now than when RunningAverages was created "
                f"({quoted(sorted(more), 2)}): their averages are not kept. Make it when all that will be trained "
                "requires a gradient."
            )

    def report_wrapper(self) -> None:
        """Report once that a wrapper such as DistributedDataParallel contains a module that is averaged as a plain one.

        The first two calls check this: when the averages are created, and at their first update.
        """
        if not self._wrapper_checks_left or self._pods.rank != 0:
            return
        self._wrapper_checks_left -= 1
        if wrapper := enclosing_wrapper(self._engine):
            self._wrapper_checks_left = 0
            notice(
                f"RunningAverages of a plain module that a {wrapper} wraps: every rank holds whole averages. Make "
                f"them of the {wrapper}, so that each holds a part."
            )

    def _require_gradients(self) -> frozenset[str]:
        return frozenset(name for name, p in self._engine.module.named_parameters() if p.requires_grad)


def _trained_names(engine: Engine) -> frozenset[str]:
    parameters = engine.parameters.values()
    names = frozenset(info.name for info in parameters if info.trainable and info.dtype.is_floating_point)
    if not names:
        raise ConfigError(
            f"RunningAverages: none of the model's {len(parameters)} parameters requires a gradient, so that there is "
            "nothing to average. Set requires_grad first."
        )
    return names


def _described(buffers: dict[str, torch.Tensor]) -> dict[str, str]:
    return {name: f"{buffer.dtype} of shape {tuple(buffer.shape)}" for name, buffer in buffers.items()}
