"""The language-model trunk of one seed."""

from functools import cached_property
from pathlib import Path

from torch import nn

from examples.proof.averages import attached
from examples.proof.cost import Cost
from examples.proof.language.methods import branch, make
from examples.proof.language.texts import check_sources, write_texts
from examples.proof.language.trunk import Trunk
from examples.proof.parts import Part, slug
from examples.proof.work import Settings, Work, read_settings
from examples.training import Training
from twa_scale.config import RunConfig, load_config
from twa_scale.ranks import World
from twa_scale.run.tasks import Task

HERE = Path(__file__).parent


class Language(Work):
    """The work on one seed.

    Args:
        out: the directory of all seeds.
        seed: of the starting weights and of the order of the data.
        settings: from `read`.
        packages: where the Debian packages are.
    """

    part_bytes = 5_000_000  # most of it are the candidates and states of the trunk

    def __init__(self, out: Path, seed: int, settings: Settings, packages: Path) -> None:
        super().__init__(out, seed, settings)
        self.packages = packages
        steps = settings["trunk"]["steps"]
        branches = {branch(steps, m["steps"]) for m in settings["methods"].values() if m["how"] == "decayed"}
        trunk = {**settings["trunk"], "branches": sorted(branches)}
        self.trunk = Trunk(self.directory / "trunk", trunk, {**self.recorded_before, "trunk": trunk})

    @staticmethod
    def read(size: str) -> Settings:
        """Return methods.yaml, with steps and windows of the methods divided as a smaller `size` says."""
        settings = read_settings(HERE / "methods.yaml", size)
        most, shrink = settings["trunk"]["candidates"], settings.get("shrink", 1)
        for method in settings["methods"].values():
            if "steps" in method:
                method["steps"] = round(method["steps"] / shrink)
            if "last" in method:
                method["last"] = sorted({min(most, max(2, round(n * most / 40))) for n in method["last"]})
        return settings

    def check_inputs(self) -> None:
        check_sources(self.settings["texts"], self.packages)

    @property
    def task(self) -> Task:
        return self.training.task

    @property
    def model(self) -> nn.Module:
        return self.training.model

    def before(self) -> list[Part]:
        return [Part("trunk", self.trunk.recorded, lambda: self.trunk.run(self.training))]

    def warm(self) -> None:
        with attached(self.model, self.trunk.candidates, select={"last": 2}):
            self.validation()

    def make(self, name: str, method: Settings) -> str:
        return make(self, name, method)

    def cost(self, method: Settings, cost: Cost) -> Cost:
        if method["how"] == "decayed":  # its other steps take the place of steps of the trunk
            return Cost(method["steps"], 0, cost.seconds * method["steps"] / cost.steps)
        return super().cost(method, cost)

    def config(self, name: str = "", method: Settings | None = None) -> RunConfig:
        """Return config.yaml with the paths and the seed of this run, and the settings of a method."""
        method = method or {}
        steps = method.get("steps", round(60 / self.settings.get("shrink", 1)))
        paths = [f"task.text.{split}={self.out}/texts/{split}" for split in ("train", "validation", "test")]
        own = [f"candidates={self.trunk.candidates}", f"output={self.directory}/runs/{slug(name)}", f"seed={self.seed}"]
        sizes = [f"batch_size={self.settings['batch_size']}", f"steps={steps}", f"evaluate_every={max(1, steps // 3)}"]
        overrides = [*paths, *own, *sizes, *self.settings.get("config", []), *method.get("settings", [])]
        return load_config(HERE / "config.yaml", overrides)

    @cached_property
    def training(self) -> Training:
        write_texts(self.out / "texts", self.settings["texts"], self.settings["pieces"], self.packages)
        trunk = self.settings["trunk"]
        return Training(self.config(), World.from_environment(), trunk["steps"], trunk["lr"])
