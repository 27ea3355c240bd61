"""Which parameters of a model are averaged, and where this rank's part of them lies."""

import torch

from twa_scale.base.notices import notice
from twa_scale.base.spans import Span
from twa_scale.engines import Engine
from twa_scale.errors import ConfigError
from twa_scale.ranks import Pods
from twa_scale.store.host_memory import Pages


class Parameters:
    """The floating point parameters that require a gradient when this is made.

    Args:
        engine: holds the model.
        pods: all ranks.
        device: "auto" or "cpu": where averages lie.

    Raises:
        ConfigError: there are none.
    """

    def __init__(self, engine: Engine, pods: Pods, device: str) -> None:
        self._engine = engine
        self._pods = pods
        self._in_host_memory = device == "cpu" and engine.device.type != "cpu"
        self._pages = Pages(engine.device)
        self._reported = False
        infos = engine.parameters.values()
        self.names = frozenset(info.name for info in infos if info.trainable and info.dtype.is_floating_point)
        if not self.names:
            raise ConfigError(
                f"RunningAverages: none of the model's {len(infos)} parameters requires a gradient, so that there is "
                "nothing to average. Set requires_grad first."
            )

    def live(self) -> dict[Span, torch.Tensor]:
        """Return the live memory of this rank's spans, without empty ones."""
        engine = self._engine
        return {span: engine.live(span) for span in engine.spans() if span.name in self.names and len(span)}

    def allocate(self, count: int, dtype: torch.dtype) -> torch.Tensor:
        """Return zeros where averages lie."""
        if self._in_host_memory:
            return self._pages.zeros(count, dtype=dtype, device=torch.device("cpu"))
        return torch.zeros(count, dtype=dtype, device=self._engine.device)

    def require_same(self) -> None:
        """Refuse parameters that were replaced, and report once those that are trained now and were not before.

        Raises:
            EngineError: names a parameter that was replaced.
        """
        self._engine.changed(self.names)
        if self._reported:
            return
        now = sum(parameter.requires_grad for parameter in self._engine.module.parameters())
        known = sum(info.trainable for info in self._engine.parameters.values())
        self._reported = now > known
        if self._reported and self._pods.rank == 0:
            notice(
                f"{now - known} more parameters require a gradient now than when RunningAverages was made: their "
                "averages are not kept. Make it when all that will be trained requires a gradient."
            )
