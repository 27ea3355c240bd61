"""The regression of the tests with a wider layer, so that each phase of a run takes some milliseconds."""

from torch import nn

from tests.commands.small_runs import Scores


class Wide(Scores):
    """A model with half a million parameters."""

    def model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(64, 8000), nn.Tanh(), nn.Linear(8000, 1))


def wide() -> Wide:
    """Return the task. A configuration names the import path of this function."""
    return Wide()


WIDE = {"name": "tests.chaos.task:wide"}
