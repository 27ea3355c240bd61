"""Soups of LoRA adapters of one seed: as soups of fine-tunings, but only adapters are trained and averaged."""

from pathlib import Path
from typing import Any

from examples.proof.adapters.classification import AdapterClassification
from examples.proof.parts import slug
from examples.proof.soup.task import Soup
from examples.proof.work import Settings
from examples.soup.finetune import train
from twa_scale.config import RunConfig
from twa_scale.merge import average_fixed


class Adapters(Soup):
    """The work on one seed. The model is a PeftModel with the adapter of the fine-tuning or the method at hand."""

    part_bytes = 3_000_000
    folder = Path(__file__).parent

    def fine_tune(self, seed: int, rate: float, steps: int, batch_size: int, out: Path) -> None:
        model: Any = self.task.model().to(self.device)
        train(self.task, model, seed, rate, steps, batch_size)
        model.save_pretrained(out)

    def prepare(self, pool: list[str], method: Settings) -> dict[str, Any]:
        """Give the model an adapter of the shape of the average: of all ranks together in the space of products."""
        space = method.get("space", "factors")
        self.load(self._shaped(self._paths(pool), space))
        return {**super().prepare(pool, method), "space": space}

    def config(self, name: str, paths: list[str], settings: list[str]) -> RunConfig:
        space = self.settings["methods"][name]["space"]
        own = [f"space={space}", f"task.adapter={self._shaped(paths, space)}"]
        return super().config(name, paths, [*own, *settings])

    def load(self, directory: Path) -> None:
        assert isinstance(self.task, AdapterClassification)
        self.model = self.task.model_with(directory).to(self.device)

    def keep(self, name: str) -> None:
        model: Any = self.model
        model.save_pretrained(self._adapter(name))

    def restore(self, name: str) -> None:
        self.load(self._adapter(name))

    def _adapter(self, name: str) -> Path:
        return self.directory / "weights" / slug(name)

    def _shaped(self, paths: list[str], space: str) -> Path:
        """Return the directory of an adapter of the shape of an average of others."""
        if space == "factors":
            return Path(paths[0])
        out = self.directory / f"product-of-{len(paths)}"
        if not out.exists():
            average_fixed(paths, out, space="product")
        return out
