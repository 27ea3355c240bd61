"""The work on one seed of a task whose candidates come from one training run, the trunk."""

from abc import abstractmethod
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import nn

from examples.proof.averages import attached
from examples.proof.cost import Cost
from examples.proof.parts import Part, slug
from examples.proof.trunk import Trunk
from examples.proof.trunk_methods import branch, make
from examples.proof.work import Settings, Work, read_settings, shrunk
from examples.training import Training
from twa_scale.config import RunConfig, load_config
from twa_scale.ranks import World
from twa_scale.run.tasks import Task


class TrunkWork(Work):
    """The parts of one seed: the trunk, then the methods.

    Args:
        out: the directory of all seeds.
        seed: of the starting weights and of the order of the data.
        settings: with `trunk` and `methods`.
        branches: the steps whose states the trunk keeps, because other trainings start there.
    """

    def __init__(self, out: Path, seed: int, settings: Settings, branches: set[int]) -> None:
        super().__init__(out, seed, settings)
        trunk = {**settings["trunk"], "branches": sorted(branches)}
        self.trunk = Trunk(self.directory / "trunk", trunk, {**self.recorded_before, "trunk": trunk})

    @property
    @abstractmethod
    def training(self) -> Training:
        """The training of the trunk, and of what goes on from it."""

    folder: Path
    """The directory of config.yaml and methods.yaml."""

    @abstractmethod
    def data(self) -> list[str]:
        """Return the overrides of config.yaml that say where the data are."""

    @property
    def task(self) -> Task:
        return self.training.task

    @property
    def model(self) -> nn.Module:
        return self.training.model

    def before(self) -> list[Part]:
        return [Part("trunk", self.trunk.recorded, lambda: self.trunk.run(self.training))]

    def warm(self) -> None:
        with attached(self.model, self.trunk.candidates, select={"last": 2}) as average:
            self.training.backward(0)
            average.step()  # compiles kernels on a GPU
            self.score()

    def make(self, name: str, method: Settings) -> str:
        return make(self, name, method)

    def score(self) -> float:
        """Return the validation loss of the weights in the model, by which methods choose."""
        return self.validation()

    def candidates(self, method: Settings) -> str:
        """Return the pattern of the candidates of a method."""
        return f"{self.candidates_of(method['of'])}/step-*" if "of" in method else self.trunk.candidates

    def candidates_of(self, method: str) -> Path:
        """Return the directory of the candidates that a method leaves."""
        return self.directory / "candidates" / slug(method)

    def cost(self, method: Settings, cost: Cost) -> Cost:
        if method["how"] == "decayed":  # its other steps take the place of steps of the trunk
            return cost.of(method["steps"])
        return super().cost(method, cost)

    def config(self, name: str = "", method: dict[str, Any] | None = None) -> RunConfig:
        """Return config.yaml with the paths and the seed of this run, and the settings of a method."""
        method = method or {}
        steps = method.get("steps", round(self.settings["config.yaml"]["steps"] / self.settings.get("shrink", 1)))
        own = [f"candidates={self.candidates(method)}", f"output={self.directory}/runs/{slug(name)}"]
        own.append(f"device={self.device.type}")
        sizes = [f"batch_size={self.settings['batch_size']}", f"steps={steps}", f"evaluate_every={max(1, steps // 3)}"]
        sizes += [f"select.last={number}" for number in method.get("last", [])]
        overrides = [*self.data(), *own, f"seed={self.seed}", *sizes, *self.settings.get("config", [])]
        return load_config(self.folder / "config.yaml", [*overrides, *method.get("settings", [])])


class DecayedTrunkWork(TrunkWork):
    """The parts of one seed of a task whose trunk has a constant rate, and is also decayed from several of its steps.

    Args:
        out: the directory of all seeds.
        seed: of the starting weights and of the order of the data.
        settings: from `read`.
        packages: where the Debian packages of the data are.
    """

    candidates_at_full_size: int

    def __init__(self, out: Path, seed: int, settings: Settings, packages: Path) -> None:
        steps = settings["trunk"]["steps"]
        decayed = [method for method in settings["methods"].values() if method["how"] == "decayed"]
        super().__init__(out, seed, settings, {branch(steps, method["steps"]) for method in decayed})
        self.packages = packages

    @classmethod
    def read(cls, size: str) -> Settings:
        """Return methods.yaml, with steps and windows of the methods as a smaller `size` says."""
        settings = read_settings(cls.folder / "methods.yaml", size)
        most = cls.candidates_at_full_size
        settings["methods"] = {name: resized(one, settings, most) for name, one in settings["methods"].items()}
        return settings

    @abstractmethod
    def write_data(self) -> None:
        """Write the data, unless they are there."""

    @cached_property
    def training(self) -> Training:
        self.write_data()
        trunk = self.settings["trunk"]
        return Training(self.config(), World.from_environment(), trunk["steps"], trunk["lr"])


def resized(method: Settings, settings: Settings, candidates: int, part: str = "trunk") -> Settings:
    """Return a method of a smaller size: its steps are divided, and its windows are the same parts of all candidates.

    Args:
        method: with the `steps` and the windows, `last`, of the full size.
        settings: of the smaller size, with `shrink`, which divides the steps.
        candidates: how many there are at the full size.
        part: the settings with the number of `candidates` at the smaller size.
    """
    most, made = settings[part]["candidates"], shrunk(method, settings)
    if "last" in method:
        made["last"] = sorted({min(most, max(2, round(n * most / candidates))) for n in method["last"]})
    return made
