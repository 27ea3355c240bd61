"""The training of a detector of one seed."""

from pathlib import Path

from examples.proof.detection.canvases import write_canvases
from examples.proof.images.data import PACKAGE
from examples.proof.packages import package_file
from examples.proof.trunk_work import DecayedTrunkWork


class Detection(DecayedTrunkWork):
    """The work on one seed. See `DecayedTrunkWork`."""

    part_bytes = 20_000_000  # most of it are the candidates and states of the trunk
    folder = Path(__file__).parent
    candidates_at_full_size = 30

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

    def write_data(self) -> None:
        write_canvases(self.out / "data", self.settings["canvases"], self.packages)
