"""Files of torch that are created in full size without the values of tensors, which all ranks then write."""

import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch

from twa_scale.candidates.formats.boxes import BoxTensor
from twa_scale.candidates.formats.dcp import DcpFolder
from twa_scale.candidates.formats.origin import Keys
from twa_scale.candidates.formats.placement import Placeable, placed, storages
from twa_scale.candidates.formats.stored_tensors import Record, Stored
from twa_scale.candidates.formats.torch_file import tensors_in
from twa_scale.errors import OutputError
from twa_scale.output.disk import drop_cached_pages, pieces_of, write_at
from twa_scale.output.file_layout import TensorSpec
from twa_scale.output.formats.format import PlaceFunction, Run, WeightFiles

Located = Mapping[Path, Mapping[str, Keys]]
"""The path of keys of each tensor by its name, for each file of torch.save or for the folder of DCP."""


class PlacedFiles(WeightFiles):
    """Weight files that the readers of candidates open to find the places of tensors.

    Args:
        specs: the tensors to write.
        keys: the paths of keys of the tensors, by the paths of files in the output directory.
    """

    def __init__(self, specs: Sequence[TensorSpec], keys: Located) -> None:
        if wrong := next((spec.name for spec in specs if spec.as_complex), None):
            raise OutputError(f"tensor {wrong!r}: is complex; only --format hf (format='hf') writes complex tensors.")
        self._specs = specs
        self._keys = keys
        self._storages_of_files: Mapping[str, Sequence[Placeable]] = {}
        self._records: list[Record] = []
        self._shared: list[tuple[str, str]] = []
        self._directory = Path()

    def places(self, directory: Path) -> Mapping[str, Sequence[Placeable]]:
        """Return the tensors in the files that hold each weight. Those after the first may have other dtypes."""
        tensors = read_tensors({directory / path: stored_keys for path, stored_keys in self._keys.items()})
        return {name: [tensor] for name, tensor in tensors.items()}

    @property
    def shared(self) -> Sequence[tuple[str, str]]:
        """Pairs of tensors that have one place in the files."""
        return self._shared

    def open(self, directory: Path) -> PlaceFunction:
        """Find the places of the tensors, before any rank changes the files."""
        self._directory = directory
        self._storages_of_files = self.places(directory)
        records: dict[tuple[str, int], Record] = {}
        first: dict[tuple[str, int, int], str] = {}
        shared: dict[tuple[str, str], None] = {}
        for spec in self._specs:
            for stored in self._storages(spec):
                key = stored.record.file.path, stored.record.begin
                records.setdefault(key, stored.record)
                if stored.numel and (other := first.setdefault((*key, stored.first), spec.name)) != spec.name:
                    shared[other, spec.name] = None
        self._shared = list(shared)
        self._records = list(records.values())
        self._fields = [record.crc_fields() for record in self._records]
        paths = {record.file.path for record in self._records}
        self._names = {path: os.path.relpath(path, directory) for path in paths}
        for record in self._records:
            record.file.close()
        for path in paths:
            drop_cached_pages(path)
        return self._runs_of

    def _runs_of(self, name: str, start: int, values: torch.Tensor) -> Iterator[Run]:
        for tensor in self._storages_of_files[name]:
            for record, first, part in placed(tensor, start, _converted(tensor.dtype, values, name)):
                data = part.view(torch.uint8).numpy().data
                yield Run(self._names[record.file.path], record.begin + first * part.itemsize, data)

    def _storages(self, spec: TensorSpec) -> list[Stored]:
        first, *copies = self._storages_of_files[spec.name]
        return checked(first, spec) + [part for copy in copies for part in storages(copy, f"tensor {spec.name!r}")]

    def checksums(self, rank: int, size: int) -> Mapping[int, int]:
        """Return the CRC-32 of some records, by their number."""
        result = {}
        for number in range(rank, len(self._records), size):
            record = self._records[number]
            with Path(record.file.path).open("rb", buffering=0) as file:
                result[number] = _crc(file.fileno(), record.begin, record.nbytes)
        return result

    def finish(self, checksums: Mapping[int, int]) -> None:
        """Write the CRC-32 of every record into the archives."""
        for number, record in enumerate(self._records):
            with Path(record.file.path).open("r+b", buffering=0) as file:
                for offset in self._fields[number]:
                    write_at(file.fileno(), checksums[number].to_bytes(4, "little"), offset)
        for name in self.names:
            with (self._directory / name).open("rb") as file:
                os.fsync(file.fileno())


def _converted(dtype: torch.dtype, values: torch.Tensor, name: str) -> torch.Tensor:
    """Return the values in the dtype of a copy of the weights.

    Raises:
        OutputError: a value is too large for this dtype.
    """
    if dtype == values.dtype:
        return values
    copied = values.to(dtype)
    if dtype.is_floating_point and not bool(torch.isfinite(copied).all()):
        raise OutputError(
            f"tensor {name!r}: has values that {dtype}, in which the last candidate also holds it, cannot express. "
            "Choose --format hf, dcp or pt (format=)."
        )
    return copied


def read_tensors(keys: Located) -> dict[str, Stored | BoxTensor]:
    """Return the tensors in files of torch.save, and in folders of DCP, by name."""
    tensors: dict[str, Stored | BoxTensor] = {}
    for path, stored_keys in keys.items():
        if path.is_dir():
            tensors |= DcpFolder(path).tensors(stored_keys)
        else:
            file_tensors = tensors_in(path)
            tensors |= {name: file_tensors[keys_of] for name, keys_of in stored_keys.items()}
    return tensors


def differs(spec: TensorSpec, dtype: torch.dtype, shape: tuple[int, ...]) -> str:
    """Return the message for a tensor whose dtype or shape differs from that in the files of the last candidate."""
    fix = "Leave out dtype, or choose" if shape == spec.shape else "Choose"
    return (
        f"tensor {spec.name!r}: is {spec.dtype} of shape {spec.shape}, but {dtype} of shape {shape} in the last "
        f"candidate, whose form --format same (format='same') keeps. {fix} another format."
    )


def checked(tensor: Placeable, spec: TensorSpec) -> list[Stored]:
    """Return the tensors in files of which a tensor consists.

    Raises:
        OutputError: the tensor has another shape or dtype than the one to write.
        CandidateError: see `storages`.
    """
    if tensor.shape != spec.shape or tensor.dtype != spec.dtype:
        raise OutputError(differs(spec, tensor.dtype, tensor.shape))
    return storages(tensor, f"tensor {spec.name!r}")


def _crc(handle: int, begin: int, nbytes: int) -> int:
    crc = 0
    for _, piece in pieces_of(handle, begin, begin + nbytes):
        crc = zlib.crc32(piece, crc)
    return crc
