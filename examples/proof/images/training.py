"""Training of a classifier, with augmentation that a resumed training repeats."""

import math
from abc import ABC, abstractmethod

import torch

from examples.training import Training


class ImageTraining(Training, ABC):
    """Training whose first part has the full rate, so that trainings of other lengths begin with the same steps."""

    constant: float
    """The fraction of a training that has the full rate."""

    @classmethod
    @abstractmethod
    def schedule(cls, progress: float) -> float:
        """Return the factor of the rate after a fraction of a training; 1 until `constant`."""

    @classmethod
    def leaves(cls, steps: int, extra: int) -> int:
        """Return the step at which a training of `steps` + `extra` leaves a trunk of `steps`, as its rate falls."""
        return min(steps, int(cls.constant * (steps + extra)))

    def follow(self, start: int, stop: int, total: int) -> None:
        """Take the steps from `start` to `stop` of a training of `total` steps."""
        for step in range(start, stop):
            self.update(step, self.schedule(step / total))

    def update(self, step: int, factor: float) -> float:
        torch.manual_seed(self.batches.seed * 1_000_003 + step)  # of the augmentation
        return super().update(step, factor)


class SgdTraining(ImageTraining):
    """Training with Nesterov's momentum of 0.9 and a weight decay of 5e-4; gradients are not clipped.

    The rate falls to a tenth after half of the training, and to a hundredth after three quarters.
    """

    constant = 0.5
    max_norm = math.inf

    def make_optimizer(self, lr: float) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.model.parameters(), lr=lr, momentum=0.9, nesterov=True, weight_decay=5e-4)

    @classmethod
    def schedule(cls, progress: float) -> float:
        return 1.0 if progress < 0.5 else 0.1 if progress < 0.75 else 0.01
