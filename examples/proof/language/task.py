"""The language-model trunk of one seed."""

from functools import cached_property
from pathlib import Path

from examples.proof.language.texts import check_sources, write_texts
from examples.proof.trunk_methods import branch
from examples.proof.trunk_work import TrunkWork, resized
from examples.proof.work import Settings, read_settings
from examples.training import Training
from twa_scale.ranks import World

HERE = Path(__file__).parent


class Language(TrunkWork):
    """The work on one seed.

    Args:
        out: the directory of all seeds.
        seed: of the starting weights and of the order of the data.
        settings: from `read`.
        packages: where the Debian packages are.
    """

    part_bytes = 5_000_000  # most of it are the candidates and states of the trunk
    folder = HERE

    def __init__(self, out: Path, seed: int, settings: Settings, packages: Path) -> None:
        steps = settings["trunk"]["steps"]
        decayed = [method for method in settings["methods"].values() if method["how"] == "decayed"]
        super().__init__(out, seed, settings, {branch(steps, method["steps"]) for method in decayed})
        self.packages = packages

    @staticmethod
    def read(size: str) -> Settings:
        """Return methods.yaml, with steps and windows of the methods as a smaller `size` says."""
        settings = read_settings(HERE / "methods.yaml", size)
        settings["methods"] = {name: resized(one, settings, 40) for name, one in settings["methods"].items()}
        return settings

    def check_inputs(self) -> None:
        check_sources(self.settings["texts"], self.packages)

    def data(self) -> list[str]:
        return [f"task.text.{split}={self.out}/texts/{split}" for split in ("train", "validation", "test")]

    @cached_property
    def training(self) -> Training:
        write_texts(self.out / "texts", self.settings["texts"], self.settings["pieces"], self.packages)
        trunk = self.settings["trunk"]
        return Training(self.config(), World.from_environment(), trunk["steps"], trunk["lr"])
