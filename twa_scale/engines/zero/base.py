"""What ZeRO-1, 2 and 3 share: counting micro-batches as `engine.step` would, and the loss scale."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from twa_scale.config import BLOCK
from twa_scale.engines.engine import Consume, Engine, LossScale
from twa_scale.engines.parameters import claim, persistent_buffers, release
from twa_scale.engines.private_attributes import require
from twa_scale.engines.zero.deepspeed_settings import check_trainable, settings_of, warn_of_clipping
from twa_scale.ranks import Group

_OPTIMIZER = ("dp_process_group", "optimizer", "zero_grad", "loss_scale", "loss_scaler")

NO_GRADIENT = (
    "there is no gradient: call engine.backward(loss) before twa.step(), and leave engine.step() out, which twa.step() "
    "replaces."
)


class DeepSpeedLossScale(LossScale):
    """The scale that DeepSpeed's fp16 mode puts on the loss."""

    def __init__(self, optimizer: Any) -> None:
        self._optimizer = optimizer

    def value(self) -> float:
        """Return the factor of the present gradients."""
        return float(self._optimizer.loss_scale)

    def update(self, overflow: bool) -> None:
        """Let DeepSpeed's rule choose the next one."""
        self._optimizer.loss_scaler.update_scale(overflow)


class ZeroEngine(Engine):
    """A DeepSpeedEngine in place of whose `step` the average steps.

    Spans are those of DeepSpeed's own partitions: this rank's float32 weights and its averaged gradients lie there.
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
        """Return the "twa" block of DeepSpeed's JSON."""
        block: Mapping[str, Any] = settings_of(self._engine).get(BLOCK, {})
        return block

    def check(self) -> None:
        """Refuse settings under which the average would not train as it says, and state that it never uses."""
        check_trainable(self._engine, with_state=self.keeps_optimizer)
        if self.shard_group.rank == 0:
            warn_of_clipping(self._engine)

    def boundary(self) -> bool:
        """Return whether this micro-batch ends an accumulation, and count it: DeepSpeed does so in `engine.step`."""
        engine = self._engine
        complete = bool(engine.is_gradient_accumulation_boundary())
        engine.micro_steps += 1
        if complete:
            engine.global_steps += 1
            engine.global_samples += engine.train_batch_size()
        return complete

    def steps_taken(self) -> int:
        """Return DeepSpeed's own count: its `step` is called for each micro-batch."""
        return int(self._engine.global_steps)

    def buffers(self) -> dict[str, torch.Tensor]:
        """Return the module's buffers, which ZeRO does not shard."""
        return persistent_buffers(self.module)

    def watch(self, consume: Consume) -> None:
        """Remember who consumes the gradients: a partition is final when DeepSpeed's backward has ended."""
        claim(self._engine)
        self._consume = consume

    def close(self) -> None:
        """Forget the consumer."""
        if self._consume is not None:
            release(self._engine)
        self._consume = None
