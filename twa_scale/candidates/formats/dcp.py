"""Checkpoints of torch.distributed.checkpoint (DCP): tensors stored in chunks and read by slices."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from twa_scale.base.inputs import brief, integers, text
from twa_scale.base.paths import identity
from twa_scale.candidates.ema_lists import item_name
from twa_scale.candidates.formats.boxes import Box, BoxTensor
from twa_scale.candidates.formats.file_handles import File
from twa_scale.candidates.formats.origin import Keys, Origin
from twa_scale.candidates.formats.pickle_stubs import PickleStub
from twa_scale.candidates.formats.pickles import MAX_PICKLE, SafeUnpickler
from twa_scale.candidates.formats.stored_tensors import Stored, StoredCandidate
from twa_scale.candidates.formats.torch_archive import Archive
from twa_scale.candidates.weights_key import WeightsKey
from twa_scale.errors import CandidateError

METADATA = ".metadata"
_Items = Mapping[tuple[str, tuple[int, ...]], PickleStub]


def open_dcp(directory: Path, keys: WeightsKey | None = None, outer: Path | None = None) -> StoredCandidate:
    """Open a folder that `torch.distributed.checkpoint.save` wrote: `.metadata` and files of chunks.

    Args:
        directory: the folder.
        keys: the choice of the weights in the saved state dict. By default the weights are found by name, or under
            usual keys such as "model" and "app" at any depth.
        outer: the directory that is the candidate, with its small files, if it is another.

    Raises:
        CandidateError: the metadata is damaged, a file is missing, or there are no weights.
    """
    try:
        return _open(directory, _metadata(directory / METADATA), keys or WeightsKey(), outer or directory)
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise CandidateError(
            f"{directory / METADATA}: does not have the layout of torch.distributed.checkpoint "
            f"({type(error).__name__}: {error}). Copy the folder again, or leave this candidate out."
        ) from error


def _open(directory: Path, metadata: Any, keys: WeightsKey, outer: Path) -> StoredCandidate:
    files = _Files(directory)
    label = str(outer)
    metadata_of = _metadata_of(metadata)
    shapes = {path: integers(value.size) for path, (_, value) in metadata_of.items()}
    chosen = keys.choose(shapes, label, in_order=False)
    tensors = _tensors(chosen, metadata, metadata_of, files, label)
    version = identity(directory / METADATA)[2:]
    description = "a checkpoint of torch.distributed.checkpoint"
    origin = Origin(description, "dcp", {directory: chosen}, {directory / METADATA: version})
    return StoredCandidate(tensors, files.open.values(), label, outer, origin)


class DcpFolder:
    """The tensors of a checkpoint, from its metadata, which is read once.

    Args:
        directory: the folder with `.metadata`.

    Raises:
        CandidateError: the metadata cannot be read.
    """

    shapes: Mapping[Keys, tuple[int, ...]]
    """The shapes of all tensors, by their paths of keys."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._metadata = _metadata(directory / METADATA)
        try:
            self._metadata_of = _metadata_of(self._metadata)
            self.shapes = {keys: integers(value.size) for keys, (_, value) in self._metadata_of.items()}
        except (AttributeError, LookupError, TypeError, ValueError) as error:
            raise CandidateError(f"{directory / METADATA}: cannot be read ({error}).") from error

    @property
    def entries(self) -> list[str]:
        """The names of all entries: tensors, and other objects."""
        return [key for key in self._metadata.state_dict_metadata if isinstance(key, str)]

    def tensors(self, keys: Mapping[str, Keys]) -> dict[str, BoxTensor]:
        """Return tensors by name.

        Args:
            keys: the path of keys of each tensor, by name.
        """
        return _tensors(keys, self._metadata, self._metadata_of, _Files(self._directory), str(self._directory))


def files_in_dcp(directory: Path) -> list[Path]:
    """Return the metadata and the files of chunks of a checkpoint.

    Args:
        directory: the folder with `.metadata`.
    """
    return [directory / METADATA, *sorted(path for path in directory.glob("*.distcp") if path.is_file())]


def _metadata_of(metadata: Any) -> dict[Keys, tuple[str, PickleStub]]:
    """Return the key and the metadata of each tensor, by its path of keys."""
    paths = metadata.planner_data or {}
    return {
        _path(paths.get(text(key), (key,))): (key, value)
        for key, value in metadata.state_dict_metadata.items()
        if isinstance(value.properties, PickleStub)
    }


def _tensors(
    chosen: Mapping[str, Keys],
    metadata: Any,
    metadata_of: Mapping[Keys, tuple[str, PickleStub]],
    files: "_Files",
    label: str,
) -> dict[str, BoxTensor]:
    items = {(text(key.fqn), integers(key.offset or ())): item for key, item in metadata.storage_data.items()}
    return {
        name: _tensor(*metadata_of[path], items, files, f"{label}: tensor {name!r}") for name, path in chosen.items()
    }


def _path(keys: Any) -> tuple[str, ...]:
    if not isinstance(keys, tuple) or not all(type(key) in (str, int) for key in keys):
        raise ValueError(f"{brief(keys)} is not a path of keys")
    return tuple(key if isinstance(key, str) else item_name(key) for key in keys)


class _Files:
    """The files of chunks by number. A file is opened at its first read."""

    def __init__(self, directory: Path) -> None:
        self.open: dict[int, File] = {}
        self._paths = list(directory.iterdir())
        self._numbers = {path.name: i for i, path in enumerate(self._paths)}

    def number(self, name: str, description: str) -> int:
        if name not in self._numbers:
            raise CandidateError(
                f"{description}: is stored in {name!r}, which is not there. Copy the whole folder again, or leave this "
                "candidate out."
            )
        return self._numbers[name]

    def __getitem__(self, number: int) -> File:
        if number not in self.open:
            self.open[number] = File(self._paths[number])
        return self.open[number]


def _metadata(path: Path) -> Any:
    file = File(path)
    raw = bytearray(min(file.size, MAX_PICKLE + 1))
    file.read(memoryview(raw), 0, "the metadata")
    file.close()
    try:
        metadata = SafeUnpickler(raw).load()
        metadata.state_dict_metadata.items()
        metadata.storage_data.items()
    except (AttributeError, TypeError, ValueError) as error:
        raise CandidateError(
            f"{path}: is not metadata of torch.distributed.checkpoint ({type(error).__name__}: {error}). Copy the "
            "folder again, or leave this candidate out."
        ) from error
    return metadata


def _tensor(key: str, metadata: PickleStub, items: _Items, files: _Files, description: str) -> BoxTensor:
    dtype = metadata.properties.state[0]
    boxes = []
    for chunk in metadata.chunks:
        starts, sizes = integers(chunk.offsets), integers(chunk.sizes)
        item = items.get((key, starts))
        if item is None:
            raise CandidateError(f"{description}: the metadata does not locate its part at {starts}. Save it again.")
        if item.transform_descriptors:
            raise CandidateError(
                f"{description}: is stored as {brief(item.transform_descriptors)}, which cannot be read by slices. "
                "Save it without extensions."
            )
        byte_range = integers([item.offset, item.length])
        boxes.append(Box(starts, sizes, (files.number(text(item.relative_path), description), *byte_range)))
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"{key!r} has no dtype")
    return BoxTensor(integers(metadata.size), dtype, boxes, partial(_find, files), description)


def _find(files: _Files, box: Box) -> Stored:
    number, offset, length = box.storage_index
    file = files[number]
    if min(offset, length) < 0 or offset + length > file.size:
        raise CandidateError(
            f"{file.path}: has {file.size} bytes, but a tensor ends at byte {offset + length}; the file is truncated. "
            "Copy it again, or leave this candidate out."
        )
    stored = Archive(file, offset, length).content()
    if not isinstance(stored, Stored):
        raise CandidateError(f"{file.path}: holds no tensor at byte {offset}. Copy it again.")
    return stored
