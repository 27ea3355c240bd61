"""One file of torch.save, written by slices."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from twa_scale.candidates.formats.origin import Keys
from twa_scale.output.file_layout import TensorSpec
from twa_scale.output.formats.format import OutputFormat, WeightFiles
from twa_scale.output.formats.placed_files import PlacedFiles
from twa_scale.output.formats.torch_api import NUMBERS_FILE, save_without_values, without_values


class TorchFormat(OutputFormat):
    """One state dict, as torch.save writes it.

    Args:
        file: the name of the file.
        nesting: the keys under which the state dict is; none for the state dict itself.
    """

    name = "pt"

    def __init__(self, file: str, nesting: Keys) -> None:
        self._file = file
        self._nesting = nesting

    def files(
        self, specs: Sequence[TensorSpec], max_shard_size: int, base: str, metadata: Mapping[str, str] | None
    ) -> WeightFiles:
        """Return one file, of any size."""
        return _TorchFile(specs, self._file, self._nesting)


class _TorchFile(PlacedFiles):
    def __init__(self, specs: Sequence[TensorSpec], file: str, nesting: Keys) -> None:
        super().__init__(specs, {Path(file): {spec.name: (*nesting, spec.name) for spec in specs}})
        self._file = file
        self._nesting = nesting

    @property
    def nbytes(self) -> int:
        return sum(spec.nbytes + NUMBERS_FILE for spec in self._specs)

    @property
    def names(self) -> Sequence[str]:
        return [self._file]

    def create(self, directory: Path) -> None:
        content: dict[str, Any] = {spec.name: without_values(spec.shape, spec.dtype) for spec in self._specs}
        for key in reversed(self._nesting):
            content = {key: content}
        save_without_values(content, directory / self._file, sum(spec.nbytes for spec in self._specs))
