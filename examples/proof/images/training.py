"""Training of the network with SGD, and with augmentation that a resumed training repeats."""

import math

import torch

from examples.training import Training


class SgdTraining(Training):
    """Training with Nesterov's momentum of 0.9 and a weight decay of 5e-4; gradients are not clipped."""

    max_norm = math.inf

    def make_optimizer(self, lr: float) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.model.parameters(), lr=lr, momentum=0.9, nesterov=True, weight_decay=5e-4)

    def update(self, step: int, factor: float) -> float:
        torch.manual_seed(self.batches.seed * 1_000_003 + step)  # of the augmentation
        return super().update(step, factor)


def step_schedule(progress: float) -> float:
    """Return the factor of the rate after a fraction of a training: a tenth from half on, a hundredth from 3/4 on."""
    return 1.0 if progress < 0.5 else 0.1 if progress < 0.75 else 0.01
