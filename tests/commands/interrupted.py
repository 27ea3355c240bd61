"""The regression task of the tests, with a signal during training or with slow steps."""

import os
import signal
import time

from torch import Tensor, nn

from tests.commands.small_runs import Scores, Tensors


class Interrupted(Scores):
    """Sends a signal to its own rank at the `call`-th call of a method."""

    def __init__(self, method: str = "", call: int = 1, rank: int = 0, seconds: float = 0.0) -> None:
        super().__init__()
        self._calls_left = {method: call} if rank == int(os.environ.get("RANK", "0")) else {}
        self._seconds = seconds

    def model(self) -> nn.Module:
        self._called("model")
        return super().model()

    def dataset(self, split: str) -> Tensors:
        self._called("dataset")
        return super().dataset(split)

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        self._called("loss")
        time.sleep(self._seconds)
        return super().loss(model, batch)

    def metrics(self, model: nn.Module, batch: dict[str, Tensor]) -> dict[str, tuple[Tensor, int]]:
        self._called("metrics")
        return super().metrics(model, batch)

    def _called(self, method: str) -> None:
        if method in self._calls_left:
            self._calls_left[method] -= 1
            if not self._calls_left[method]:
                os.kill(os.getpid(), signal.SIGUSR1 if method == "loss" else signal.SIGTERM)


def scores(method: str = "", call: int = 1, rank: int = 0, seconds: float = 0.0) -> Interrupted:
    """Return the task with a signal at a call. Each step of the first process takes `seconds` longer."""
    return Interrupted(method, call, rank, 0.0 if "SLURM_RESTART_COUNT" in os.environ else seconds)
