"""The training of a detector of one seed."""

from functools import cached_property
from pathlib import Path

from examples.proof.detection.canvases import write_canvases
from examples.proof.images.data import PACKAGE
from examples.proof.packages import package_file
from examples.proof.trunk_methods import branch
from examples.proof.trunk_work import TrunkWork, resized
from examples.proof.work import Settings, read_settings
from examples.training import Training
from twa_scale.ranks import World

HERE = Path(__file__).parent


class Detection(TrunkWork):
    """The work on one seed.

    Args:
        out: the directory of all seeds.
        seed: of the starting weights and of the order of the data.
        settings: from `read`.
        packages: where the Debian package of the garments is.
    """

    part_bytes = 20_000_000  # most of it are the candidates and states of the trunk
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
        settings["methods"] = {name: resized(one, settings, 30) for name, one in settings["methods"].items()}
        return settings

    def check_inputs(self) -> None:
        package_file(self.packages, PACKAGE)

    def data(self) -> list[str]:
        data = self.out / "data"
        return [
            f"task.{split}.{key}={data}/{split}{suffix}"
            for split in ("train", "validation", "test")
            for key, suffix in {"images": "", "annotations": ".json"}.items()
        ]

    def score(self) -> float:
        """Return the average precision with the sign of a loss, as runs of TWA choose by it, too."""
        return -self.metrics("validation")["ap"]

    @cached_property
    def training(self) -> Training:
        write_canvases(self.out / "data", self.settings["canvases"], self.packages)
        trunk = self.settings["trunk"]
        return Training(self.config(), World.from_environment(), trunk["steps"], trunk["lr"])
