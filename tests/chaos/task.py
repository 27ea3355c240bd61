"""The small regression on the digits with a wider layer, so that each phase of a run lasts some milliseconds."""

from torch import nn

from tests.commands.material import Scores


class Wide(Scores):
    """Half a million parameters."""

    def model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(64, 8000), nn.Tanh(), nn.Linear(8000, 1))


def wide() -> Wide:
    """The import path of this function is what a configuration names."""
    return Wide()


WIDE = {"name": "tests.chaos.task:wide"}
