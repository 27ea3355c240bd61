"""A checkpoint of torch.distributed.checkpoint (DCP), written by slices."""

import pickle
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from math import prod
from pathlib import Path

import torch
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from twa_scale.candidates.formats.dcp import METADATA
from twa_scale.candidates.formats.file_handles import File
from twa_scale.candidates.formats.origin import Keys
from twa_scale.candidates.formats.torch_archive import Archive
from twa_scale.output.disk import write_at
from twa_scale.output.file_layout import TensorSpec
from twa_scale.output.formats.format import OutputFormat, WeightFiles
from twa_scale.output.formats.placed_files import PlacedFiles
from twa_scale.output.formats.torch_api import NUMBERS_FILE, save_without_values, storage_info, without_values
from twa_scale.output.publish import write_file

_CHUNK_BYTES = 64 << 20  # A rank that loads a part of a tensor reads the whole chunks that hold it.


class DcpFormat(OutputFormat):
    """A directory that `torch.distributed.checkpoint.load` reads on any number of ranks.

    Args:
        folder: the folder in the output directory, "." for the directory itself.
        nesting: the keys under which the state dict is; none for the state dict itself.
    """

    name = "dcp"

    def __init__(self, folder: str, nesting: Keys) -> None:
        self._folder = folder
        self._nesting = nesting

    def files(
        self, specs: Sequence[TensorSpec], max_shard_size: int, base: str, metadata: Mapping[str, str] | None
    ) -> WeightFiles:
        """Return the metadata, and files of chunks of rows with at most `max_shard_size` bytes of chunks each."""
        return _DcpFiles(specs, self._folder, self._nesting, max_shard_size)


class _DcpFiles(PlacedFiles):
    def __init__(self, specs: Sequence[TensorSpec], folder: str, nesting: Keys, max_shard_size: int) -> None:
        super().__init__(specs, {Path(folder): {spec.name: (*nesting, spec.name) for spec in specs}})
        self._folder = Path(folder)
        self._nesting = nesting
        self._chunks = list(_in_files(specs, max_shard_size))

    @property
    def nbytes(self) -> int:
        return sum(spec.nbytes for spec in self._specs) + len(self._chunks) * NUMBERS_FILE

    @property
    def names(self) -> Sequence[str]:
        files = sorted({number for number, *_ in self._chunks})
        return [str(self._folder / METADATA), *(str(self._folder / _file_name(number)) for number in files)]

    def create(self, directory: Path) -> None:
        folder = directory / self._folder
        folder.mkdir(parents=True, exist_ok=True)
        pieces = lru_cache(maxsize=None)(lambda shape, dtype: _archive(shape, dtype, folder / "chunk.tmp"))
        sizes: dict[int, int] = {}
        storage = {}
        chunks: dict[str, list[ChunkStorageMetadata]] = {}
        for number, spec, starts, shape in self._chunks:
            head, numbers, tail = pieces(shape, spec.dtype)
            begin, length = sizes.get(number, 0), len(head) + numbers + len(tail)
            with (folder / _file_name(number)).open("r+b" if begin else "wb", buffering=0) as file:
                write_at(file.fileno(), head, begin)
                write_at(file.fileno(), tail, begin + len(head) + numbers)
            sizes[number] = begin + length
            storage[MetadataIndex(self._key(spec), starts)] = storage_info(_file_name(number), begin, length)
            chunks.setdefault(spec.name, []).append(ChunkStorageMetadata(torch.Size(starts), torch.Size(shape)))
        metadata = Metadata(
            {
                self._key(spec): TensorStorageMetadata(
                    TensorProperties(dtype=spec.dtype), torch.Size(spec.shape), chunks[spec.name]
                )
                for spec in self._specs
            },
            {self._key(spec): (*self._nesting, spec.name) for spec in self._specs},
            storage,
        )
        write_file(folder / METADATA, pickle.dumps(metadata))

    def _key(self, spec: TensorSpec) -> str:
        return ".".join((*self._nesting, spec.name))


def _file_name(number: int) -> str:
    return f"__0_{number}.distcp"


def _in_files(
    specs: Sequence[TensorSpec], max_shard_size: int
) -> Iterator[tuple[int, TensorSpec, tuple[int, ...], tuple[int, ...]]]:
    """Yield the number of its file, the tensor, the first indices and the shape of each chunk."""
    number = size = 0
    for spec in specs:
        for starts, shape in _chunks(spec):
            nbytes = prod(shape) * spec.dtype.itemsize
            if size and size + nbytes > max_shard_size:
                number, size = number + 1, 0
            size += nbytes
            yield number, spec, starts, shape


def _chunks(spec: TensorSpec) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    if not spec.shape or spec.nbytes <= _CHUNK_BYTES:
        yield (0,) * len(spec.shape), spec.shape
        return
    rows = max(1, _CHUNK_BYTES // (spec.nbytes // spec.shape[0]))
    for first in range(0, spec.shape[0], rows):
        rest = spec.shape[1:]
        yield (first, *(0,) * len(rest)), (min(rows, spec.shape[0] - first), *rest)


def _archive(shape: tuple[int, ...], dtype: torch.dtype, path: Path) -> tuple[bytes, int, bytes]:
    """Return the archive of one tensor: the bytes before its numbers, their size in bytes, and the bytes after them."""
    save_without_values(without_values(shape, dtype), path, prod(shape) * dtype.itemsize)
    file = File(path)
    try:
        record = Archive(file).content().record
        head, tail = bytearray(record.begin), bytearray(file.size - record.begin - record.nbytes)
        file.read(memoryview(head), 0, "the archive")
        file.read(memoryview(tail), record.begin + record.nbytes, "the archive")
        return bytes(head), record.nbytes, bytes(tail)
    finally:
        file.close()
        path.unlink()
