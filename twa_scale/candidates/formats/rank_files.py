"""Sharded state dicts of FSDP that each rank wrote with torch.save, as verl does: model_world_size_8_rank_0.pt, .."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from twa_scale.base.inputs import integers
from twa_scale.base.names import quoted
from twa_scale.candidates.formats.boxes import Box, BoxTensor
from twa_scale.candidates.formats.file_handles import File
from twa_scale.candidates.formats.origin import Origin
from twa_scale.candidates.formats.pickle_stubs import PickleStub
from twa_scale.candidates.formats.stored_tensors import Stored, StoredCandidate
from twa_scale.candidates.formats.torch_archive import Archive
from twa_scale.candidates.weights_key import WeightsKey
from twa_scale.errors import CandidateError

_NAME = re.compile(r"model_world_size_(?P<size>\d+)_rank_(?P<rank>\d+)\.pt")
_HUGGING_FACE = "huggingface"  # the folder in which verl writes configuration and tokenizer
_DTENSOR = "torch.distributed.tensor.DTensor"
_DTENSORS = (_DTENSOR, "torch.distributed._tensor.api.DTensor", "torch.distributed._tensor.DTensor")
_SHARDED = "torch.distributed._shard.sharded_tensor.api.ShardedTensor"
_FIX = "Save the model with torch.distributed.checkpoint, or convert it with `python -m verl.model_merger`."

Value = Stored | PickleStub


def is_rank_file(file: Path) -> bool:
    """Return whether a file holds the state dict of one rank."""
    return _NAME.fullmatch(file.name) is not None


def has_rank_files(directory: Path) -> bool:
    """Return whether a directory holds state dicts of ranks."""
    return any(map(is_rank_file, directory.iterdir()))


def open_rank_files(directory: Path, keys: WeightsKey | None = None) -> StoredCandidate:
    """Open the state dicts of all ranks as one. The files of replicas are parsed, and their tensors are not read.

    Args:
        directory: the folder of the files. Its small files are those of its folder `huggingface`, if it has one.
        keys: the choice of the weights.

    Raises:
        CandidateError: a file is missing or damaged, or tensors are distributed in a way that is not supported.
    """
    paths = _paths(directory)
    files: list[File] = []
    try:
        files += map(File, paths)
        states = [_state(file) for file in files]
        if len(states) > 1 and not any(isinstance(value, PickleStub) for value in states[0].values()):
            raise CandidateError(
                f"{directory}: holds {len(states)} files of ranks without distributed tensors, and it is unknown how "
                f"they belong together. If each holds the whole model, copy one under another name. {_FIX}"
            )
        _require_same_names(states, paths)
        tensors = {name: _Parts(name, [state[name] for state in states], paths).tensor() for name in states[0]}
        chosen = (keys or WeightsKey()).choose({(name,): t.shape for name, t in tensors.items()}, str(directory))
        weights = {name: tensors[path[0]] for name, path in chosen.items()}
        subdirectory = directory / _HUGGING_FACE
        small = subdirectory if subdirectory.is_dir() else directory
        return StoredCandidate(weights, files, str(directory), small, Origin("the files of single ranks"))
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        for file in files:
            file.close()
        raise CandidateError(
            f"{directory}: its files of ranks do not have the layout of FSDP's sharded state dicts "
            f"({type(error).__name__}: {error}). {_FIX}"
        ) from error
    except BaseException:
        for file in files:
            file.close()
        raise


def _paths(directory: Path) -> list[Path]:
    """Return the files of the ranks in their order."""
    result: dict[int, dict[int, Path]] = {}
    for path in sorted(directory.iterdir()):
        if match := _NAME.fullmatch(path.name):
            result.setdefault(int(match["size"]), {})[int(match["rank"])] = path
    if len(result) > 1:
        raise CandidateError(
            f"{directory}: holds files of saves on {' and '.join(map(str, sorted(result)))} ranks. Remove those of the "
            "older save."
        )
    ((size, by_rank),) = result.items()
    if missing := [rank for rank in range(size) if rank not in by_rank]:
        raise CandidateError(
            f"{directory}: has no 'model_world_size_{size}_rank_{missing[0]}.pt', and {len(missing)} of {size} files "
            "are missing. Copy the whole folder again, or leave this candidate out."
        )
    return [by_rank[rank] for rank in range(size)]


def _state(file: File) -> dict[str, Value]:
    content = Archive(file).content()
    if not isinstance(content, Mapping) or not content:
        raise CandidateError(f"{file.path}: holds no state dict of a model. Copy it again.")
    return {str(name): value for name, value in content.items() if isinstance(value, Stored | PickleStub)}


def _require_same_names(states: Sequence[Mapping[str, Value]], paths: Sequence[Path]) -> None:
    for state, path in zip(states, paths, strict=True):
        if differing := state.keys() ^ states[0].keys():
            raise CandidateError(
                f"{path}: holds other tensors than {paths[0].name!r} ({quoted(sorted(differing))}). All files must "
                "come from the same save: copy the folder again."
            )


class _Parts:
    """The parts of one tensor in the files of all ranks."""

    def __init__(self, name: str, values: Sequence[Value], paths: Sequence[Path]) -> None:
        self._name = name
        self._values = values
        self._paths = paths
        self._description = f"{paths[0].parent}: tensor {name!r}"

    def tensor(self) -> Stored | BoxTensor:
        """Return the whole tensor.

        Raises:
            CandidateError: it is distributed in a way that is not supported, or parts of it are missing.
        """
        first = self._values[0]
        kinds = {value.class_name if isinstance(value, PickleStub) else "a plain tensor" for value in self._values}
        if len(kinds) > 1:
            raise CandidateError(
                f"{self._description}: is {' and '.join(sorted(kinds))} in files of different ranks. {_FIX}"
            )
        if isinstance(first, Stored):
            return self._plain(first)
        if first.class_name not in (*_DTENSORS, _SHARDED):
            raise CandidateError(f"{self._description}: is a {first.class_name}, which is not supported. {_FIX}")
        stubs = [value for value in self._values if isinstance(value, PickleStub)]
        _, dtype, size, *_ = first.arguments or [None, None, ()]
        shape = integers(size)
        if not isinstance(dtype, torch.dtype):
            raise ValueError(f"{self._name!r} has no dtype")
        parts = self._sharded(stubs) if first.class_name == _SHARDED else self._dtensor(stubs, shape)
        stored = [part for part, _ in parts]
        boxes = [Box(starts, part.shape, (number,)) for number, (part, starts) in enumerate(parts)]
        return BoxTensor(shape, dtype, boxes, lambda box: stored[box.storage_index[0]], self._description)

    def _plain(self, first: Stored) -> Stored:
        """Return a tensor that every rank holds, such as a buffer; that of the first rank is read."""
        for value, path in zip(self._values, self._paths, strict=True):
            if isinstance(value, Stored) and (value.shape, value.dtype) != (first.shape, first.dtype):
                raise CandidateError(
                    f"{path}: tensor {self._name!r} has the shape {value.shape} here and {first.shape} on the first "
                    f"rank, without the position of a part in the tensor. {_FIX}"
                )
        return first

    def _sharded(self, stubs: Sequence[PickleStub]) -> list[tuple[Stored, tuple[int, ...]]]:
        """Return the local shards of a ShardedTensor, each with its offsets."""
        return [
            (shard.tensor, integers(shard.metadata.shard_offsets))
            for stub in stubs
            for shard in (stub.state or ((),))[0]
        ]

    def _dtensor(self, stubs: Sequence[PickleStub], shape: tuple[int, ...]) -> list[tuple[Stored, tuple[int, ...]]]:
        """Return the local tensors of a DTensor with their offsets, each once."""
        local = [self._local(stub) for stub in stubs]
        dim = self._dim(stubs)
        if dim is None:
            return [(local[0], (0,) * len(shape))]
        lengths = [part.shape[dim] for part in local]
        count = _num_shards(lengths, shape[dim])
        if count is None:
            raise CandidateError(
                f"{self._description}: the ranks hold {lengths[:8]} of {shape[dim]} indices of dim {dim}, which are "
                f"not the shards of a mesh. All files must come from the same save. {_FIX}"
            )
        chunk = -(-shape[dim] // count)
        starts = [min(chunk * rank, shape[dim]) for rank in range(count)]
        return [
            (part, tuple(start if i == dim else 0 for i in range(len(shape))))
            for part, start in zip(local, starts, strict=False)
        ]

    def _local(self, stub: PickleStub) -> Stored:
        if not isinstance(stub._local_tensor, Stored):
            raise ValueError(f"{self._name!r} has no local tensor")
        return stub._local_tensor

    def _dim(self, stubs: Sequence[PickleStub]) -> int | None:
        """Return the dimension that is sharded, or None if the tensor is replicated."""
        placements = [
            (placement.kind.rpartition(".")[2], placement.dim)
            for placement in stubs[0]._spec.placements or ()
            if placement is not None
        ]
        kinds = [kind for kind, _ in placements]
        if not kinds or any(kind != "Replicate" for kind in kinds[:-1]) or kinds[-1] not in ("Replicate", "Shard"):
            raise CandidateError(
                f"{self._description}: has the placements ({', '.join(kinds)}); read are those of FSDP and HSDP, "
                f"(Shard) and (Replicate, Shard). {_FIX}"
            )
        if kinds[-1] == "Replicate":
            return None
        (dim,) = integers([placements[-1][1]])
        return dim


def _num_shards(lengths: Sequence[int], size: int) -> int | None:
    """Return the number of consecutive ranks that together hold a dimension once. Later ranks hold replicas.

    A mesh is in row-major order, and its last dimension shards as `torch.chunk` does.
    """
    for count in (count for count in range(1, len(lengths) + 1) if len(lengths) % count == 0):
        chunk = -(-size // count)
        expected = [max(0, min(chunk, size - chunk * rank)) for rank in range(count)]
        if list(lengths) == expected * (len(lengths) // count):
            return count
    return None
