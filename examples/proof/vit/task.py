"""The vision transformer of one seed: the comparison of `images` with another network, optimizer and schedule."""

from pathlib import Path

from examples.proof.images.task import Images
from examples.proof.vit.training import AdamWTraining


class Vit(Images):
    """The work on one seed. See `Images`."""

    folder = Path(__file__).parent
    kind = AdamWTraining
