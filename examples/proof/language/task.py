"""The language-model trunk of one seed: its parts, from the trunk to the test loss of every method."""

from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any

import torch
import yaml

from examples.proof.cost import Cost, measured
from examples.proof.language.methods import Weights, attached, branch, make
from examples.proof.language.texts import write_texts
from examples.proof.language.trunk import Trunk, load, save
from examples.proof.parts import Part, Row, Rows, slug
from examples.training import Training
from twa_scale.config import RunConfig, load_config
from twa_scale.ranks import Group, World
from twa_scale.run.batches import make_batches
from twa_scale.run.evaluate import evaluate
from twa_scale.run.tasks.byte_gpt import ByteGPT

HERE = Path(__file__).parent


def read_settings(size: str = "full") -> dict[str, Any]:
    """Return methods.yaml, with steps and windows of the methods divided as a smaller `size` says."""
    settings: dict[str, Any] = yaml.safe_load((HERE / "methods.yaml").read_text())
    smaller = settings.pop("sizes")
    if size == "full":
        return settings
    settings |= smaller[size]
    for method in settings["methods"].values():
        if "steps" in method:
            method["steps"] = round(method["steps"] / settings["shrink"])
        if "last" in method:
            most = settings["trunk"]["candidates"]
            method["last"] = sorted({min(most, max(2, round(n * most / 40))) for n in method["last"]})
    return settings


class Language:
    """The work on one seed.

    Args:
        out: the directory of all seeds.
        seed: of the starting weights and of the order of the data.
        size: `full`, `small` or `tiny`.
        packages: where the Debian packages are.
    """

    def __init__(self, out: Path, seed: int, size: str, packages: Path) -> None:
        self.out, self.seed, self.size, self.packages = out, seed, size, packages
        self.settings = read_settings(size)
        self.directory = out / f"seed-{seed}"
        self.rows = Rows(self.directory)
        self._texts = out / "texts"
        steps = self.settings["trunk"]["steps"]
        decayed = [m["steps"] for m in self.settings["methods"].values() if m["how"] == "decayed"]
        branches = [branch(steps, extra) for extra in decayed]
        self.trunk = Trunk(self.directory / "trunk", {**self.settings["trunk"], "branches": branches})

    def parts(self) -> list[Part]:
        """Return the parts in their order. Only final seeds read the test split, when all methods are finished."""
        methods = self.settings["methods"].items()
        trunk = Part("trunk", {key: self.settings[key] for key in ("trunk", "texts")}, self.make_trunk)
        made = [Part(slug(name), method, partial(self.row, name)) for name, method in methods]
        tested = [Part(f"test/{slug(name)}", method, partial(self.test, name)) for name, method in methods]
        final = self.seed in self.settings["seeds"]
        return [trunk, *made, *(tested if final else [])]

    def make_trunk(self) -> Row:
        return self.trunk.run(self.training)

    def row(self, name: str) -> Row:
        """Run a method and keep its weights.

        The cost is that beyond the trunk, with that of the method it starts from.
        """
        method = self.settings["methods"][name]
        self._load_kernels()
        with measured(ByteGPT, self.config().batch_size) as cost:
            chosen = make(self, name, method)
        if method["how"] == "decayed":  # its other steps take the place of steps of the trunk
            cost = Cost(method["steps"], 0, cost.seconds * method["steps"] / cost.steps)
        if "start" in method:
            before = self.rows[slug(method["start"])]
            cost += Cost(before["steps"], before["evaluations"], before["seconds"])
        save(self.training.model.state_dict(), self._weights(name))
        return {"chosen": chosen, **cost.row(), "validation": self.validation()}

    def test(self, name: str) -> Row:
        """Evaluate the weights of a method on the test split."""
        self.training.model.load_state_dict(self.weights_of(name))
        return {"loss": self._loss("test")}

    def validation(self) -> float:
        return self._loss("validation")

    def config(self, name: str = "", settings: list[str] | None = None) -> RunConfig:
        """Return config.yaml with the paths and the seed of this run, and the settings of a method."""
        steps = round(60 / self.settings.get("shrink", 1))
        paths = [f"task.text.{split}={self._texts}/{split}" for split in ("train", "validation", "test")]
        own = [f"candidates={self.trunk.candidates}", f"output={self.directory}/runs/{slug(name)}", f"seed={self.seed}"]
        length = [f"steps={steps}", f"evaluate_every={max(1, steps // 3)}"] if self.size != "full" else []
        overrides = [*paths, *own, *length, *self.settings.get("config", []), *(settings or [])]
        return load_config(HERE / "config.yaml", overrides)

    def weights_of(self, method: str) -> Weights:
        return load(self._weights(method))

    @cached_property
    def training(self) -> Training:
        write_texts(self._texts, self.settings["texts"], self.settings["pieces"], self.packages)
        trunk = self.settings["trunk"]
        return Training(self.config(), World.from_environment(), trunk["steps"], trunk["lr"])

    @cache  # noqa: B019
    def _load_kernels(self) -> None:
        """Make one average, so that no method pays for what a process loads and compiles once."""
        with attached(self, 2, {}):
            self.validation()

    def _weights(self, method: str) -> Path:
        return self.directory / "weights" / f"{slug(method)}.pt"

    def _loss(self, split: str) -> float:
        task, config = self.training.task, self.config()
        batches = make_batches(task.dataset(split), split, config.batch_size, None, 0, 1, 0)
        return evaluate(task, self.training.model, batches, Group.world(), torch.device("cpu"))["loss"]
