"""The language-model trunk of one seed."""

from pathlib import Path

from examples.proof.language.texts import check_sources, write_texts
from examples.proof.trunk_work import DecayedTrunkWork


class Language(DecayedTrunkWork):
    """The work on one seed. See `DecayedTrunkWork`."""

    part_bytes = 5_000_000  # most of it are the candidates and states of the trunk
    folder = Path(__file__).parent
    candidates_at_full_size = 40

    def check_inputs(self) -> None:
        check_sources(self.settings["texts"], self.packages)

    def data(self) -> list[str]:
        return [f"task.text.{split}={self.out}/texts/{split}" for split in ("train", "validation", "test")]

    def write_data(self) -> None:
        write_texts(self.out / "texts", self.settings["texts"], self.settings["pieces"], self.packages)
