"""Sharded safetensors files of DCP: each rank wrote its parts of the tensors, with their offsets in the header."""

import re
from collections.abc import Sequence
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import torch

from twa_scale.base.inputs import integers, parse_json
from twa_scale.candidates.formats.boxes import Box, BoxTensor
from twa_scale.candidates.formats.file_handles import File
from twa_scale.candidates.formats.origin import Origin
from twa_scale.candidates.formats.safetensors import read_header
from twa_scale.candidates.formats.stored_tensors import Record, Stored, StoredCandidate
from twa_scale.errors import CandidateError

_NAME = re.compile(r"shard-(\d+)-model-\d+-of-(\d+)\.safetensors")

_ORIGIN = Origin("the safetensors files of single ranks that DCP writes")


def is_rank_shard(file: Path) -> bool:
    """Return whether a file holds the tensor parts of one rank."""
    return _NAME.fullmatch(file.name) is not None


def open_dcp_safetensors(paths: Sequence[Path], directory: Path) -> StoredCandidate:
    """Open the unconsolidated files of a HuggingFaceStorageWriter with `save_distributed`.

    The files do not hold their number. If the last ones are missing, the parts do not cover the tensors.

    Raises:
        CandidateError: a file is missing or damaged.
    """
    shards = {int(match[1]) for path in paths if (match := _NAME.fullmatch(path.name))}
    if missing := set(range(1, max(shards))) - shards:
        raise CandidateError(
            f"{directory}: has no file shard-{min(missing):05d}-*.safetensors, but later ones. Copy the whole folder "
            "again, or leave this candidate out."
        )
    files: list[File] = []
    try:
        boxes: dict[str, list[Box]] = {}
        dtypes: dict[str, torch.dtype] = {}
        for number, path in enumerate(paths):
            files.append(File(path))
            entries, metadata = read_header(files[-1])
            offsets = _offsets(metadata, path)
            for name, entry in entries.items():
                starts = offsets.get(name, (0,) * len(entry.shape))
                if len(starts) != len(entry.shape) or dtypes.get(name, entry.dtype) != entry.dtype:
                    raise CandidateError(
                        f"{path}: tensor {name!r} of {entry.dtype} and shape {entry.shape} cannot start at {starts} of "
                        f"{dtypes.get(name, entry.dtype)}. All files must come from the same save: copy the folder "
                        "again."
                    )
                boxes.setdefault(name, []).append(Box(starts, entry.shape, (number, entry.offset)))
                dtypes[name] = entry.dtype
        tensors = {
            # The files do not hold the shape of the whole tensor; it ends where its last part ends.
            name: BoxTensor(
                _extent(tensor_boxes),
                dtypes[name],
                tensor_boxes,
                partial(_find, files, dtypes[name]),
                f"{directory}: tensor {name!r}",
            )
            for name, tensor_boxes in boxes.items()
        }
        return StoredCandidate(tensors, files, str(directory), directory, _ORIGIN)
    except BaseException:
        for file in files:
            file.close()
        raise


def _offsets(metadata: dict[str, Any], path: Path) -> dict[str, tuple[int, ...]]:
    try:
        sharding = parse_json(metadata["DCP_SHARDING_INFO"].encode())
        return {name: integers(info["saved_offsets"]) for name, info in sharding.items()}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CandidateError(
            f"{path}: its header does not give the offsets of its tensor parts (DCP_SHARDING_INFO: {error}). Save it "
            "again with torch.distributed.checkpoint."
        ) from error


def _find(files: Sequence[File], dtype: torch.dtype, box: Box) -> Stored:
    number, begin = box.storage_index
    strides = torch.empty(box.sizes, device="meta").stride()
    return Stored(Record(files[number], dtype, prod(box.sizes), lambda _: begin), 0, box.sizes, strides)


def _extent(boxes: Sequence[Box]) -> tuple[int, ...]:
    boxes = [box for box in boxes if len(box.starts) == len(boxes[0].starts)]  # `BoxTensor` refuses the others
    ends = ([start + size for start, size in zip(box.starts, box.sizes, strict=True)] for box in boxes)
    return tuple(max(column) for column in zip(*ends, strict=True))
