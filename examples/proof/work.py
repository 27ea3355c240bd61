"""The work on one seed of a task: what methods start from, the methods, and their test losses."""

import json
import math
from abc import ABC, abstractmethod
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

from examples.proof.cost import Cost, measured
from examples.proof.files import load, save
from examples.proof.parts import Part, Row, Rows, flat, slug
from examples.proof.trial_optimizers import OPTIMIZERS
from twa_scale.config.recipes import RECIPES
from twa_scale.errors import ConfigError
from twa_scale.ranks import Group
from twa_scale.run.batches import make_batches
from twa_scale.run.evaluate import evaluate
from twa_scale.run.tasks import Task

Settings = dict[str, Any]

# The row of a part depends on none of these.
NOT_OF_ONE_PART = (
    "seeds", "development", "before", "methods", "tables", "claims", "spreads", "compared", "part_bytes"
)  # fmt: skip


class Work(ABC):
    """The parts of one seed.

    Args:
        out: the directory of all seeds.
        seed: of whatever is random.
        settings: from `read_settings`: `seeds` (the final ones), `methods` by name, and what the task needs.
    """

    part_bytes: int
    """What a part leaves on the disk, on average, unless the settings have it."""
    source = "packages"
    """The argument of the command that says where the data come from."""

    def __init__(self, out: Path, seed: int, settings: Settings) -> None:
        self.out, self.seed, self.settings = out, seed, settings
        self.directory = out / f"seed-{seed}"
        self.rows = Rows(self.directory)
        self._shared = {key: value for key, value in settings.items() if key not in NOT_OF_ONE_PART}
        self._warm = False

    @abstractmethod
    def check_inputs(self) -> None:
        """Raise a SystemExit if a file that the work needs is missing."""

    @property
    @abstractmethod
    def task(self) -> Task:
        """The data and the loss."""

    @property
    @abstractmethod
    def model(self) -> nn.Module:
        """The model that methods leave their weights in."""

    @property
    def device(self) -> torch.device:
        """The device of the model."""
        return torch.device(self.settings.get("device", "cpu"))

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
        methods = self.settings["methods"]
        made = [Part(slug(name), self._recorded(name), partial(self.row, name)) for name in methods]
        tested = [Part(f"test/{slug(name)}", self._recorded(name), partial(self.test, name)) for name in methods]
        return [*self.before(), *made, *(tested if self.seed in self.settings["seeds"] else [])]

    @property
    def recorded_before(self) -> Settings:
        """Return the settings that the parts of `before` depend on. Of config.yaml it is the task."""
        return {**self._shared, "config.yaml": {"task": self.settings["config.yaml"]["task"]}}

    def missing(self) -> list[str]:
        """Return the names of the parts that have no row yet."""
        return [part.name for part in self.parts() if part.name not in self.rows]

    def bytes_needed(self) -> int:
        """Return what these parts will leave on the disk."""
        of_each: int = self.settings.get("part_bytes", self.part_bytes)
        return of_each * sum(not name.startswith("test/") for name in self.missing())

    def row(self, name: str) -> Row:
        """Run a method and keep its weights. The cost is what comes on top of `before`."""
        method = self.settings["methods"][name]
        if not self._warm:
            self.warm()
            self._warm = True
        with measured(self.model, self.settings["batch_size"]) as cost:
            chosen = self.make(name, method)
        self.keep(name)
        return {"chosen": chosen, **self.cost(method, cost).row(), "validation": self.validated()}

    def cost(self, method: Settings, cost: Cost) -> Cost:
        """Return the cost of a method, of which `cost` was counted, with that of the method it starts from."""
        if "start" in method:
            before = self.rows[slug(method["start"])]
            cost += Cost(before["steps"], before["evaluations"], before["seconds"])
        return cost

    def test(self, name: str) -> Row:
        """Evaluate the weights of a method on the test split."""
        self.restore(name)
        return self.metrics("test")

    def keep(self, name: str) -> None:
        """Write the weights in the model to a file, as those of a method."""
        save(self.model.state_dict(), self._weights(name))

    def restore(self, name: str) -> None:
        """Put the weights that `keep` has written into the model."""
        self.model.load_state_dict(self.weights_of(name))

    def weights_of(self, method: str) -> dict[str, torch.Tensor]:
        return load(self._weights(method))

    def validation(self) -> float:
        """Return the loss of the model on the validation split."""
        return self.metrics("validation")["loss"]

    def validated(self) -> dict[str, float]:
        """Return the metrics of a method on validation data, which the tables of development seeds have."""
        return self.metrics("validation")

    def metrics(self, split: str, limit: int | None = None) -> dict[str, float]:
        """Return the metrics of the model on a split, or on its first `limit` batches."""
        batches = make_batches(self.task.dataset(split), split, self.settings["batch_size"], None, 0, 1, 0)
        limit = limit or self.settings.get("evaluate_batches")
        return evaluate(self.task, self.model, batches, Group.world(), self.device, limit)

    def _recorded(self, name: str) -> Settings:
        """Return all settings that the row of a method depends on."""
        return {**self._shared, "method": self._with_others(name)}

    def _with_others(self, name: str) -> Settings:
        """Return a method with the settings of those it is made from in the place of their names."""
        method: Settings = self.settings["methods"][name]
        return method | {key: self._with_others(method[key]) for key in ("start", "of") if key in method}

    def _weights(self, method: str) -> Path:
        return self.directory / "weights" / f"{slug(method)}.pt"


def read_settings(path: Path, size: str) -> Settings:
    """Return the settings of a task; those of a smaller `size` replace others.

    Those of the file config.yaml next to `path` are in it by the file's name. A method with a `recipe` has its settings
    before its own.

    Raises:
        ConfigError: the task has no such size, or a method an unknown recipe or optimizer.
    """
    settings: Settings = yaml.safe_load(path.read_text())
    smaller: Settings = settings.pop("sizes")
    config = {"config.yaml": yaml.safe_load(path.with_name("config.yaml").read_text())}
    if size not in ("full", *smaller):
        sizes = ", ".join(["full", *smaller])
        raise ConfigError(f"{path.parent.name} has no size {size}; it has {sizes}. --task leaves it out")
    settings |= config | smaller.get(size, {})
    for method in chain.from_iterable(settings.get(key, {}).values() for key in ("methods", "head", "tail")):
        if method.get("optimizer") not in (None, *OPTIMIZERS):
            raise ConfigError(f"optimizer: {method['optimizer']} is unknown; it is one of {', '.join(OPTIMIZERS)}")
        if "recipe" in method:
            method["settings"] = [*recipe_settings(method["recipe"]), *method.get("settings", [])]
    return settings


def shrunk(method: Settings, settings: Settings) -> Settings:
    """Return a method whose steps or epochs are divided by `shrink` of the settings of a smaller size, if any."""
    shrink, lengths = settings.get("shrink", 1), {}
    if "steps" in method:
        lengths["steps"] = math.ceil(method["steps"] / shrink)
    if "epochs" in method:
        lengths["epochs"] = method["epochs"] / shrink
    return method | lengths


def recipe_settings(name: str) -> list[str]:
    """Return the settings of a recipe as overrides, without the length of the run and the size of a batch.

    Raises:
        ConfigError: there is no such recipe.
    """
    if name not in RECIPES:
        raise ConfigError(f"recipe: {name} is unknown; it is one of {', '.join(RECIPES)}")
    recipe = flat({key: value for key, value in RECIPES[name].items() if key not in ("steps", "epochs", "batch_size")})
    return [f"{key}={json.dumps(value)}" for key, value in recipe.items()]
