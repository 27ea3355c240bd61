"""Safetensors files with the names and the index of Hugging Face."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch

from twa_scale.output.file_layout import Shard, TensorSpec, index_name, index_of, lay_out
from twa_scale.output.formats.format import OutputFormat, Place, Run, WeightFiles


class SafetensorsFormat(OutputFormat):
    """The default format."""

    name = "hf"

    def __init__(self, beside: Sequence[tuple[str, Path]] = (), *, of_last: bool = False) -> None:
        self.beside = beside
        self.of_last = of_last

    def files(
        self, specs: Sequence[TensorSpec], max_shard_size: int, base: str, metadata: Mapping[str, str] | None
    ) -> WeightFiles:
        """Return one file, or several with an index."""
        return _SafetensorsFiles(specs, lay_out(specs, max_shard_size, base, metadata), base)


class _SafetensorsFiles(WeightFiles):
    def __init__(self, specs: Sequence[TensorSpec], shards: Sequence[Shard], base: str) -> None:
        self._specs = specs
        self._shards = shards
        self._base = base
        self._places = {name: (shard.file, offset) for shard in shards for name, offset in shard.offsets.items()}

    @property
    def nbytes(self) -> int:
        return sum(shard.nbytes for shard in self._shards)

    @property
    def names(self) -> Sequence[str]:
        return [shard.file for shard in self._shards]

    @property
    def unsigned(self) -> Sequence[str]:
        return []

    @property
    def small(self) -> Mapping[str, bytes]:
        if len(self._shards) == 1:
            return {}
        return {index_name(self._base): index_of(self._shards, self._specs)}

    def create(self, directory: Path) -> None:
        for shard in self._shards:
            with (directory / shard.file).open("wb") as file:
                file.write(shard.header)
                file.truncate(shard.nbytes)

    def open(self, directory: Path) -> Place:
        return self._place

    def finish(self, rank: int, size: int) -> None:
        pass

    def _place(self, name: str, start: int, values: torch.Tensor) -> Iterator[Run]:
        file, begin = self._places[name]
        yield Run(file, begin + start * values.itemsize, values.view(torch.uint8).numpy().data)
