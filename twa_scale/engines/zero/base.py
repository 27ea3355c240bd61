"""The base class of the ZeRO engines, which counts micro-batches instead of `engine.step`, and the loss scale."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from twa_scale.config import BLOCK
from twa_scale.engines.engine import Consume, Engine, LossScale
from twa_scale.engines.parameters import mark_attached, persistent_buffers, unmark_attached
from twa_scale.engines.private_attributes import require
from twa_scale.engines.zero.deepspeed_settings import check_trainable, settings_of, warn_of_clipping
from twa_scale.ranks import Group

_OPTIMIZER = ("dp_process_group", "optimizer", "zero_grad", "loss_scale", "loss_scaler")
_COUNTERS = ("micro_steps", "global_steps", "global_samples", "_is_gradient_accumulation_boundary")

NO_GRADIENT = (
    "there is no gradient: call engine.backward(loss) before twa.step(), and remove engine.step(), which twa.step() "
    "replaces."
)


class DeepSpeedLossScale(LossScale):
    """The loss scaler of DeepSpeed's fp16 mode."""

    def __init__(self, optimizer: Any) -> None:
        self._optimizer = optimizer

    def value(self) -> float:
        """Return the factor by which the current gradients are scaled."""
        return float(self._optimizer.loss_scale)

    def update(self, overflow: bool) -> None:
        """Choose the next factor by DeepSpeed's rule."""
        self._optimizer.loss_scaler.update_scale(overflow)


class ZeroEngine(Engine):
    """An engine for a DeepSpeedEngine. `twa.step` replaces the `step` of DeepSpeed.

    The spans are DeepSpeed's partitions, which hold the float32 weights and the averaged gradients of this rank.
    """

    def __init__(self, engine: Any, replica_group: Group) -> None:
        require("deepspeed", engine.optimizer, _OPTIMIZER)
        self.module: nn.Module = engine
        self.device = torch.device(engine.device)
        self.shard_group = Group(engine.optimizer.dp_process_group)
        self.replica_group = replica_group
        self._engine = engine
        self._optimizer = engine.optimizer
        self._consume: Consume | None = None
        if engine.fp16_enabled():
            self.loss_scale = DeepSpeedLossScale(engine.optimizer)

    def settings(self) -> Mapping[str, Any]:
        """Return the "twa" block of DeepSpeed's configuration."""
        block: Mapping[str, Any] = settings_of(self._engine).get(BLOCK, {})
        return block

    def check(self) -> None:
        """Check that DeepSpeed's settings do not change the gradient, and that its optimizer holds no unused state."""
        check_trainable(self._engine, with_state=self.keeps_optimizer)
        if self.shard_group.rank == 0:
            warn_of_clipping(self._engine)

    def boundary(self) -> bool:
        """Return whether this micro-batch completes the gradients, and count it, as DeepSpeed does in `engine.step`."""
        engine = self._engine
        complete = bool(engine.is_gradient_accumulation_boundary())
        engine.micro_steps += 1
        if complete:
            engine.global_steps += 1
            engine.global_samples += engine.train_batch_size()
        return complete

    def steps_taken(self) -> int:
        """Return DeepSpeed's own count, because its `step` is called for each micro-batch."""
        return int(self._engine.global_steps)

    def counters(self) -> Callable[[], None]:
        """Return a function that restores DeepSpeed's counts of steps and samples, and the loss scale of fp16.

        These include a boundary that `set_gradient_accumulation_boundary` has set.
        """
        saved = [(self._engine, name, getattr(self._engine, name)) for name in _COUNTERS]
        if self.loss_scale is not None:
            scaler = self._optimizer.loss_scaler
            saved += [(scaler, name, value) for name, value in vars(scaler).items()]

        def restore() -> None:
            for owner, name, value in saved:
                setattr(owner, name, value)

        return restore

    def buffers(self) -> dict[str, torch.Tensor]:
        """Return the module's buffers, which ZeRO does not shard."""
        return persistent_buffers(self.module)

    def watch(self, consume: Consume) -> None:
        """Store the callback for `drain`. Gradients are final only when DeepSpeed's backward has ended."""
        mark_attached(self._engine)
        self._consume = consume

    def close(self) -> None:
        """Remove the mark of an attached model."""
        if self._consume is not None:
            unmark_attached(self._engine)
        self._consume = None
