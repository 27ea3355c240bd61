"""Training of the vision transformer with AdamW."""

import math

from examples.proof.images.training import ImageTraining


class AdamWTraining(ImageTraining):
    """Training with AdamW and clipped gradients. The rate is constant at first, then falls to zero as half a cosine."""

    constant = 0.6

    @classmethod
    def schedule(cls, progress: float) -> float:
        falling = max(0.0, progress - cls.constant) / (1 - cls.constant)
        return (1 + math.cos(math.pi * falling)) / 2
