"""A plain training loop for the examples: one AdamW step on one batch, with warmup and clipping."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from twa_scale.config import RunConfig
from twa_scale.ranks import World
from twa_scale.run.batches import make_batches
from twa_scale.run.engines import run_engine
from twa_scale.run.tasks import build_task


class Training:
    """A model, its optimizer and its data: what one optimizer step needs. Gradients are clipped to `max_norm`.

    Args:
        config: gives the task, the engine, the device, the batch size and the seed.
        world: the ranks.
        steps: the length of the run, of which the first 5 % are the warmup.
        lr: the rate after the warmup.
    """

    max_norm = 1.0

    def __init__(self, config: RunConfig, world: World, steps: int, lr: float) -> None:
        self.task = build_task(config.task)
        self.device = world.device(config.device)
        model: Any = run_engine(config, world).build(self.task, world, self.device)
        torch.manual_seed(config.seed)
        model.init_weights()
        self.model: nn.Module = model
        self.optimizer = self.make_optimizer(lr)
        self.batches = make_batches(
            self.task.dataset("train"), "train", config.batch_size, None, world.rank, world.size, config.seed + 1
        )
        self.lr, self.warmup = lr, max(1, steps // 20)

    def make_optimizer(self, lr: float) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.1)

    def update(self, step: int, factor: float) -> float:
        """Take optimizer step `step` (from 0) with the rate times `factor`; return this rank's loss."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * factor * min(1.0, (step + 1) / self.warmup)
        loss = self.backward(step)
        nn.utils.clip_grad_norm_(self.model.parameters(), self.max_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss

    def backward(self, step: int) -> float:
        """Compute the gradients on the batch of a step; return this rank's loss."""
        (batch,) = self.batches.training(step)
        loss = self.task.loss(self.model, {key: value.to(self.device) for key, value in batch.items()})
        loss.backward()
        return loss.item()

    def decay(
        self, start: int, stop: int, factor: float = 1.0, after_step: Callable[[], object] = lambda: None
    ) -> None:
        """Take the steps from `start` to `stop` with a rate that falls linearly from `factor` to zero."""
        for step in range(start, stop):
            self.update(step, factor * (stop - step) / (stop - start))
            after_step()

    def state(self) -> dict[str, Any]:
        """Return a copy of this rank's weights and of the optimizer's state."""
        return copy.deepcopy({"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()})

    def restore(self, state: dict[str, Any]) -> None:
        """Go back to `state`."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
