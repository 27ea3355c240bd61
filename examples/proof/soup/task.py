"""Soups of fine-tunings of one seed, and the elimination test: the same without the best fine-tunings."""

import shutil
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import nn

from examples.proof.averages import attached, exported, greedy
from examples.proof.cost import Cost, measured
from examples.proof.parts import Part, Row, slug
from examples.proof.soup.sentences import joined, spread, write_halves
from examples.proof.work import Settings, Work, read_settings, shrunk
from examples.soup.finetune import finetune
from examples.soup.model_and_data import unpack_model, write_splits
from twa_scale.config import RunConfig, load_config
from twa_scale.output.publish import replace_file
from twa_scale.run.tasks import Task, build_task


class Soup(Work):
    """The work on one seed.

    Args:
        out: the directory of all seeds.
        seed: of the order of the data in all fine-tunings.
        settings: from `read`.
        sentences: the source archive of vaderSentiment 3.3.2; None if nothing is run.
    """

    part_bytes = 92_000_000  # one model
    source = "sentences"
    folder = Path(__file__).parent
    """The directory of methods.yaml and config.yaml."""

    def __init__(self, out: Path, seed: int, settings: Settings, sentences: Path | None) -> None:
        super().__init__(out, seed, settings)
        self.sentences = sentences

    @classmethod
    def read(cls, size: str) -> Settings:
        """Return methods.yaml, with each method once for every pool of fine-tunings, or only for the `first_pool`."""
        settings = read_settings(cls.folder / "methods.yaml", size)
        settings["before"] = [f"fine-tuning-{i:02}" for i in range(settings["fine_tunings"]["number"])]
        methods, claims = settings["methods"], settings["claims"]
        pools, reference = settings.pop("without_best"), settings.pop("reference")
        settings |= {"methods": {}, "claims": [], "tables": []}
        for number in pools:
            made = {name: one for name, one in methods.items() if number == pools[0] or not one.get("first_pool")}
            names = {name: f"{name}, {pool_name(number)}" for name in made}
            settings["methods"] |= {
                names[name]: shrunk(one, settings) | {"without": number} for name, one in made.items()
            }
            of_pool = [pair for pair in claims if all(name in made for name in pair if name in methods)]
            settings["claims"] += [[names[name] for name in pair] for pair in of_pool]
            settings["tables"].append({"reference": names[reference], "methods": list(names.values())})
        return settings

    def before(self) -> list[Part]:
        settings, names = self.recorded_before, enumerate(self.settings["before"])
        return [Part(name, settings, partial(self.fine_tuned, i, self._fine_tuning(name))) for i, name in names]

    def check_inputs(self) -> None:
        if self.sentences is None or not self.sentences.exists():
            raise SystemExit(f"--sentences: {self.sentences or 'the archive'} is missing: `make proof` downloads it")

    def fine_tuned(self, index: int, out: Path) -> Row:
        """Make one fine-tuning, and evaluate it. Return both costs, and the metrics by which they are ranked."""
        settings, batch_size = self.settings["fine_tunings"], self.settings["batch_size"]
        rate = settings["rates"][index % len(settings["rates"])]
        with measured(self.model, batch_size) as cost:
            self.fine_tune(self.seed * 1000 + index, rate, settings["steps"], batch_size, out)
        self.load(out)
        with measured(self.model, batch_size) as evaluation:
            metrics = self.metrics("validation")
        return {"rate": rate, **cost.row(), "evaluation": evaluation.row(), "validation": metrics}

    def fine_tune(self, seed: int, rate: float, steps: int, batch_size: int, out: Path) -> None:
        """Fine-tune the pretrained model, and write the result."""
        finetune(self.task, self.pretrained, seed, rate, steps, batch_size, out, self.device.type)

    def overrides(self, method: Settings) -> list[str]:
        """Return the settings of TWA that a method overrides."""
        found = [f"task.validation={self.joined}"] if method.get("joined") else []
        if "sentences" in method:
            found.append(f"task.validation={self.spread(method['sentences'])}")
        if "epochs" in method:  # of a run that evaluates
            limit = self.settings.get("evaluate_batches") or "null"
            found += [f"epochs={method['epochs']}", f"evaluate_batches={limit}"]
        return [*found, *method.get("settings", [])]

    def longer(self, name: str, best: str, extra: int) -> str:
        """Make a fine-tuning of `extra` steps more than the others, with the rate of the best one.

        It has the seed of the first one, but another schedule, and so other weights from the first step on.
        """
        rate, steps = self.rows[best]["rate"], self.settings["fine_tunings"]["steps"] + extra
        out = self.directory / "runs" / slug(name)
        self.fine_tune(self.seed * 1000, rate, steps, self.settings["batch_size"], out)
        self.load(out)
        shutil.rmtree(out)  # `Work.row` keeps the weights
        return f"rate {rate}"

    def pool(self, without: int) -> list[str]:
        """Return the names of the fine-tunings without the best ones, the best of them first."""
        return sorted(self.settings["before"], key=self._loss)[without:]

    def warm(self) -> None:
        two = self.pool(0)[:2]
        of_average = self.prepare(two, {})
        with attached(self.model, self._paths(two), **of_average):
            self.metrics("validation", limit=1)

    def make(self, name: str, method: Settings) -> str:
        pool = self.pool(method["without"])
        paths = self._paths(pool)
        of_average = self.prepare(pool, method)
        match method["how"]:
            case "best":
                self.load(self._fine_tuning(pool[0]))
                return pool[0]
            case "uniform":
                with attached(self.model, paths, **of_average):
                    return f"all {len(pool)}"
            case "greedy":
                return greedy(self.model, paths, self.validation, [self._loss(name) for name in pool], **of_average)
            case "longer":
                return self.longer(name, pool[0], method["steps"])
            case "twa":
                with exported(self.config(name, paths, self.overrides(method))) as (average, chosen):
                    self.load(average)
                return chosen
            case other:
                raise ValueError(f"{name}: how: {other} is unknown")

    def prepare(self, pool: list[str], method: Settings) -> dict[str, Any]:
        """Make the model ready for an average of the fine-tunings of a pool, and return settings of the average."""
        return {"store": "dense32"}

    def cost(self, method: Settings, cost: Cost) -> Cost:
        """Add the evaluations of single fine-tunings to the methods that choose by them. They are made once."""
        if method["how"] == "longer":  # only its `extra` steps count
            cost = cost.of(method["steps"])
        if method["how"] in ("best", "greedy", "longer"):
            evaluations = (Cost(**self.rows[name]["evaluation"]) for name in self.pool(method["without"]))
            cost = sum(evaluations, cost)
        return super().cost(method, cost)

    def validated(self) -> Row:
        """Development seeds are judged by validation sentences that no method has used, `test` of `files`."""
        return {} if self.seed in self.settings["seeds"] else self.metrics("test")

    def config(self, name: str, paths: list[str], settings: list[str]) -> RunConfig:
        """Return config.yaml with the paths and the seed of this run, and the settings of a method."""
        own = [f"candidates=[{', '.join(paths)}]", f"output={self.directory}/runs/{slug(name)}", f"seed={self.seed}"]
        own.append(f"device={self.device.type}")
        sizes = [f"batch_size={self.settings['batch_size']}", *self.settings.get("config", [])]
        return load_config(self.folder / "config.yaml", [*self._data, *own, *sizes, *settings])

    def load(self, directory: Path) -> None:
        """Put the weights of a fine-tuning, or of an average, into the model."""
        self.model.load_state_dict(load_file(directory / "model.safetensors"))

    @cached_property
    def task(self) -> Task:
        return build_task(load_config(self.folder / "config.yaml", self._data).task)

    @cached_property
    def model(self) -> nn.Module:
        return self.task.model().to(self.device)

    @cached_property
    def pretrained(self) -> Path:
        return unpack_model(self.out / "pretrained")

    @cached_property
    def files(self) -> dict[str, Path]:
        """The data of each split. A development seed has no file of the test split."""
        assert self.sentences is not None, "check_inputs has refused it"
        splits = write_splits(self.sentences, self.out / "data")
        chosen_by, judged_by = write_halves(splits["validation"], self.out / "halves")
        test = splits["test"] if self.seed in self.settings["seeds"] else judged_by
        return {"train": splits["train"], "validation": chosen_by, "test": test}

    @cached_property
    def joined(self) -> Path:
        """The training sentences and the validation half that methods use, in one file."""
        path = self.out / "joined.csv"
        replace_file(path, joined(self.files["train"], self.files["validation"]).encode())
        return path

    def spread(self, number: int) -> Path:
        """Return a file with some of the sentences of the validation half that methods use."""
        path = self.out / f"spread-{number}.csv"
        replace_file(path, spread(self.files["validation"], number).encode())
        return path

    @property
    def _data(self) -> list[str]:
        return [f"task.model={self.pretrained}", *(f"task.{split}={path}" for split, path in self.files.items())]

    def _loss(self, name: str) -> float:
        return float(self.rows[name]["validation"]["loss"])

    def _paths(self, names: list[str]) -> list[str]:
        return [str(self._fine_tuning(name)) for name in names]

    def _fine_tuning(self, name: str) -> Path:
        return self.directory / "fine-tunings" / name


def pool_name(without: int) -> str:
    """Return the name of the fine-tunings without the best ones."""
    return f"without the best {without}" if without else "all"
