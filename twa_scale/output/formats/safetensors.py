"""Safetensors files with the names and the index of Hugging Face."""

import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch

from twa_scale.base.names import quoted
from twa_scale.candidates.formats.safetensors import Entry
from twa_scale.errors import OutputError
from twa_scale.output.file_layout import Shard, TensorSpec, index_name, index_of, lay_out
from twa_scale.output.formats.format import OutputFormat, PlaceFunction, Run, WeightFiles
from twa_scale.output.formats.placed_files import differs


class SafetensorsFormat(OutputFormat):
    """The default format."""

    name = "hf"

    def files(
        self, specs: Sequence[TensorSpec], max_shard_size: int, base: str, metadata: Mapping[str, str] | None
    ) -> WeightFiles:
        """Return one file, or several with an index."""
        return _SafetensorsFiles(specs, lay_out(specs, max_shard_size, base, metadata), base)


class SameSafetensorsFormat(SafetensorsFormat):
    """The safetensors files of the last candidate, with the state of its training.

    Args:
        entries: the tensors in its files.
        file: the name of its file; None if it has several and an index.
        extra_files: the other files to copy.
    """

    name = "same"
    keeps_dtypes = True

    def __init__(self, entries: Mapping[str, Entry], file: str | None, extra_files: Sequence[tuple[str, Path]]) -> None:
        self._entries_of_candidate = entries
        self._file = file
        self.extra_files = extra_files

    def files(
        self, specs: Sequence[TensorSpec], max_shard_size: int, base: str, metadata: Mapping[str, str] | None
    ) -> WeightFiles:
        """Return one file of the same name if the last candidate is one file, else several with an index.

        Raises:
            OutputError: the tensors are not those in the files of the last candidate.
        """
        if lost := sorted(self._entries_of_candidate.keys() - {spec.name for spec in specs}):
            raise OutputError(
                f"tensors {quoted(lost)}: are in the file of the last candidate, but not in the output, because of "
                "`ignore` (--ignore) or `weights_key`, or because the model lacks them. Training could not resume. "
                "Average all tensors, or choose --format hf (format='hf')."
            )
        for spec in specs:
            dtype, shape = (torch.complex64, spec.shape[:-1]) if spec.as_complex else (spec.dtype, spec.shape)
            if (entry := self._entries_of_candidate.get(spec.name)) and (dtype, shape) != (entry.dtype, entry.shape):
                raise OutputError(differs(spec, entry.dtype, entry.shape))
        if self._file is None:
            return super().files(specs, max_shard_size, base, metadata)
        return super().files(specs, sys.maxsize, self._file.removesuffix(".safetensors"), metadata)


class _SafetensorsFiles(WeightFiles):
    def __init__(self, specs: Sequence[TensorSpec], shards: Sequence[Shard], base: str) -> None:
        self._specs = specs
        self._shards = shards
        self._base = base
        self._entries_of_files = {
            name: (shard.file, offset) for shard in shards for name, offset in shard.offsets.items()
        }

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

    def open(self, directory: Path) -> PlaceFunction:
        return self._runs_of

    def checksums(self, rank: int, size: int) -> Mapping[int, int]:
        return {}

    def finish(self, checksums: Mapping[int, int]) -> None:
        pass

    def _runs_of(self, name: str, start: int, values: torch.Tensor) -> Iterator[Run]:
        file, begin = self._entries_of_files[name]
        yield Run(file, begin + start * values.itemsize, values.view(torch.uint8).numpy().data)
