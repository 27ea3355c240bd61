"""The work on one seed of a task: what methods start from, the methods, and their test losses."""

from abc import ABC, abstractmethod
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

from examples.proof.cost import Cost, measured
from examples.proof.files import load, save
from examples.proof.parts import Part, Row, Rows, slug
from twa_scale.ranks import Group
from twa_scale.run.batches import make_batches
from twa_scale.run.evaluate import evaluate
from twa_scale.run.tasks import Task

Settings = dict[str, Any]


class Work(ABC):
    """The parts of one seed.

    Args:
        out: the directory of all seeds.
        seed: of whatever is random.
        settings: `seeds` (the final ones), `methods` by name, and what the task needs.
    """

    def __init__(self, out: Path, seed: int, settings: Settings) -> None:
        self.out, self.seed, self.settings = out, seed, settings
        self.directory = out / f"seed-{seed}"
        self.rows = Rows(self.directory)
        self._warm = False

    @property
    @abstractmethod
    def task(self) -> Task:
        """The data and the loss."""

    @property
    @abstractmethod
    def model(self) -> nn.Module:
        """The model that methods leave their weights in."""

    @abstractmethod
    def before(self) -> list[Part]:
        """Return what all methods start from; the rows have `seconds`."""

    @abstractmethod
    def warm(self) -> None:
        """Load what a process loads once, so that no method pays for it."""

    @abstractmethod
    def make(self, name: str, method: Settings) -> str:
        """Put the weights of a method into the model, and return what it chose."""

    def parts(self) -> list[Part]:
        """Return the parts in their order. Only final seeds read the test split, when all methods are finished."""
        methods = self.settings["methods"].items()
        made = [Part(slug(name), method, partial(self.row, name)) for name, method in methods]
        tested = [Part(f"test/{slug(name)}", method, partial(self.test, name)) for name, method in methods]
        return [*self.before(), *made, *(tested if self.seed in self.settings["seeds"] else [])]

    def row(self, name: str) -> Row:
        """Run a method and keep its weights. The cost is what comes on top of `before`."""
        method = self.settings["methods"][name]
        if not self._warm:
            self.warm()
            self._warm = True
        with measured(type(self.model), self.settings["batch_size"]) as cost:
            chosen = self.make(name, method)
        save(self.model.state_dict(), self._weights(name))
        return {"chosen": chosen, **self.cost(method, cost).row(), "validation": self.validation()}

    def cost(self, method: Settings, cost: Cost) -> Cost:
        """Return the cost of a method, of which `cost` was counted, with that of the method it starts from."""
        if "start" in method:
            before = self.rows[slug(method["start"])]
            cost += Cost(before["steps"], before["evaluations"], before["seconds"])
        return cost

    def test(self, name: str) -> Row:
        """Evaluate the weights of a method on the test split."""
        self.model.load_state_dict(self.weights_of(name))
        return self.metrics("test")

    def weights_of(self, method: str) -> dict[str, torch.Tensor]:
        return load(self._weights(method))

    def validation(self) -> float:
        """Return the loss of the model on the validation split."""
        return self.metrics("validation")["loss"]

    def metrics(self, split: str) -> dict[str, float]:
        batches = make_batches(self.task.dataset(split), split, self.settings["batch_size"], None, 0, 1, 0)
        limit = self.settings.get("evaluate_batches")
        return evaluate(self.task, self.model, batches, Group.world(), torch.device("cpu"), limit)

    def _weights(self, method: str) -> Path:
        return self.directory / "weights" / f"{slug(method)}.pt"


def read_settings(path: Path, size: str) -> Settings:
    """Return the settings of a task; those of a smaller `size` replace others."""
    settings: Settings = yaml.safe_load(path.read_text())
    smaller: Settings = settings.pop("sizes")
    return settings | ({} if size == "full" else smaller[size])
