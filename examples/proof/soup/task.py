"""Soups of fine-tunings of one seed, and the elimination test: the same without the best fine-tunings."""

from functools import cached_property, partial
from itertools import product
from pathlib import Path

from safetensors.torch import load_file
from torch import nn

from examples.proof.averages import attached, greedy, trained
from examples.proof.cost import measured
from examples.proof.parts import Part, Row, slug
from examples.proof.work import Settings, Work, read_settings
from examples.soup.finetune import finetune
from examples.soup.material import unpack_model, write_splits
from twa_scale.config import RunConfig, load_config
from twa_scale.run.tasks import Task, build_task

HERE = Path(__file__).parent


class Soup(Work):
    """The work on one seed.

    Args:
        out: the directory of all seeds.
        seed: of the order of the data in all fine-tunings.
        settings: from `read`.
        sentences: the source archive of vaderSentiment 3.3.2; None if nothing is run.
    """

    part_bytes = 92_000_000  # one model

    def __init__(self, out: Path, seed: int, settings: Settings, sentences: Path | None) -> None:
        super().__init__(out, seed, settings)
        self.sentences = sentences

    @staticmethod
    def read(size: str) -> Settings:
        """Return methods.yaml, with each method once for every pool of fine-tunings."""
        settings = read_settings(HERE / "methods.yaml", size)
        settings["before"] = [f"fine-tuning-{i:02}" for i in range(settings["fine_tunings"]["number"])]
        pools = {number: pool_name(number) for number in settings.pop("without_best")}
        methods, reference = settings["methods"], settings.pop("reference")
        settings["methods"] = {
            f"{name}, {pool}": {**method, "without": number}
            for (number, pool), (name, method) in product(pools.items(), methods.items())
        }
        settings["claims"] = [
            [f"{ours}, {pool}", f"{theirs}, {pool}"] for pool in pools.values() for ours, theirs in settings["claims"]
        ]
        settings["tables"] = [
            {"reference": f"{reference}, {pool}", "methods": [f"{name}, {pool}" for name in methods]}
            for pool in pools.values()
        ]
        return settings

    def before(self) -> list[Part]:
        settings, names = self.recorded_before, enumerate(self.settings["before"])
        return [Part(name, settings, partial(self.fine_tune, i, self._fine_tuning(name))) for i, name in names]

    def check_inputs(self) -> None:
        if self.sentences is None or not self.sentences.exists():
            raise SystemExit(f"--sentences: {self.sentences or 'the archive'} is missing: `make proof` downloads it")

    def fine_tune(self, index: int, out: Path) -> Row:
        """Make one fine-tuning, and return its cost and its validation loss, by which they are ranked."""
        settings = self.settings["fine_tunings"]
        rate = settings["rates"][index % len(settings["rates"])]
        order = self.seed * 1000 + index
        with measured(type(self.model), self.settings["batch_size"]) as cost:
            finetune(self.task, self._pretrained, order, rate, settings["steps"], self.settings["batch_size"], out)
        self._load(out)
        return {"rate": rate, **cost.row(), "validation": self.validation()}

    def pool(self, without: int) -> list[str]:
        """Return the fine-tunings without the best ones, the best of them first."""
        ranked = sorted(self.settings["before"], key=lambda name: float(self.rows[name]["validation"]))
        return [str(self._fine_tuning(name)) for name in ranked[without:]]

    def warm(self) -> None:
        with attached(self.model, self.pool(0)[:2]):
            self.validation()

    def make(self, name: str, method: Settings) -> str:
        pool = self.pool(method["without"])
        match method["how"]:
            case "best":
                self._load(Path(pool[0]))
                return Path(pool[0]).name
            case "uniform":
                with attached(self.model, pool):
                    return f"all {len(pool)}"
            case "greedy":
                return greedy(self.model, pool, self.validation)
            case "twa":
                return trained(self.model, self.config(name, pool, method.get("settings")))
            case other:
                raise ValueError(f"{name}: how: {other} is unknown")

    def config(self, name: str, pool: list[str], settings: list[str] | None = None) -> RunConfig:
        """Return config.yaml with the paths and the seed of this run, and the settings of a method."""
        own = [f"candidates=[{', '.join(pool)}]", f"output={self.directory}/runs/{slug(name)}", f"seed={self.seed}"]
        sizes = [f"batch_size={self.settings['batch_size']}", *self.settings.get("config", [])]
        return load_config(HERE / "config.yaml", [*self._data, *own, *sizes, *(settings or [])])

    @cached_property
    def task(self) -> Task:
        return build_task(load_config(HERE / "config.yaml", self._data).task)

    @cached_property
    def model(self) -> nn.Module:
        return self.task.model()

    @cached_property
    def _pretrained(self) -> Path:
        return unpack_model(self.out / "pretrained")

    @cached_property
    def _data(self) -> list[str]:
        assert self.sentences is not None, "check_inputs has refused it"
        splits = write_splits(self.sentences, self.out / "data")
        return [f"task.model={self._pretrained}", *(f"task.{split}={path}" for split, path in splits.items())]

    def _fine_tuning(self, name: str) -> Path:
        return self.directory / "fine-tunings" / name

    def _load(self, directory: Path) -> None:
        self.model.load_state_dict(load_file(directory / "model.safetensors"))


def pool_name(without: int) -> str:
    """Return the name of the fine-tunings without the best ones."""
    return f"without the best {without}" if without else "all"
