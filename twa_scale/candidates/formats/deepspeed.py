"""DeepSpeed checkpoints: parameters are read by slices from the float32 partitions of ZeRO."""

import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from math import prod
from pathlib import Path
from typing import Any

from twa_scale.base.inputs import brief, integers, read_bounded, text
from twa_scale.base.names import quoted
from twa_scale.base.paths import identity
from twa_scale.candidates.formats.deepspeed_universal import LATEST, is_universal, require_same, universal_weights
from twa_scale.candidates.formats.file_handles import File
from twa_scale.candidates.formats.origin import Keys, Origin
from twa_scale.candidates.formats.placement import Placeable
from twa_scale.candidates.formats.stored_tensors import ConcatenatedTensor, Stored, StoredCandidate
from twa_scale.candidates.formats.torch_archive import Archive, dense_tensors
from twa_scale.candidates.formats.torch_file import shapes_in
from twa_scale.candidates.formats.zero_partitions import split_fragments, split_groups, split_parameters
from twa_scale.errors import CandidateError

_MODEL = re.compile(r"(?:zero_pp_rank_(?P<rank>\d+)_)?mp_rank_(?P<slice>\d+)_model_states\.pt")
_OPTIMIZER = re.compile(r"(?:bf16_|fp16_)?zero_pp_rank_(?P<rank>\d+)_mp_rank_(?P<slice>\d+)_optim_states\.pt")
_UNSUPPORTED = {
    re.compile(r"layer_\d+_expert_\d+_.*|expp_rank_.*"): "experts (MoE)",
    re.compile(r"layer_\d+-model.*"): "a pipeline of stages",
}
_MAX_TAG_LENGTH = 4096  # bytes, the limit of a path
_STATE = "optimizer_state_dict"
_PARTITIONS = ("single_partition_of_fp32_groups", "fp32_flat_groups")  # ZeRO-1 and 2, and ZeRO-3
_CONVERT = "Convert it to safetensors with DeepSpeed's own tools, and give those files."


def is_deepspeed(directory: Path) -> bool:
    """Return whether `save_checkpoint` of a DeepSpeed engine wrote this folder or one of its subfolders."""
    return any((directory / name).is_file() for name in ("latest", LATEST)) or any(directory.glob("*_model_states.pt"))


def open_deepspeed(directory: Path) -> StoredCandidate:
    """Open a folder such as `global_step100`, or its parent, whose file `latest` names one.

    Trained parameters have the dtype of the optimizer's copy (float32, unless configured otherwise). Frozen parameters
    and buffers have the dtype of the model.

    Raises:
        CandidateError: a file is missing, damaged or from another save, or the model was split in a way that is not
            supported.
    """
    folder = tagged_folder(directory)
    versions = {path: identity(path)[2:] for path in files_in_deepspeed(directory)}
    files = _Files(folder)
    origin = Origin("a checkpoint of DeepSpeed", "deepspeed", versions=versions)
    if files.universal:
        origin = Origin("a universal checkpoint of DeepSpeed")
    try:
        return StoredCandidate(_tensors(files), files, str(directory), directory, origin)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        files.close()
        raise CandidateError(
            f"{folder}: does not have the layout of a DeepSpeed checkpoint ({type(error).__name__}: {error}). Copy it "
            "again, or convert it with DeepSpeed's zero_to_fp32.py."
        ) from error
    except BaseException:
        files.close()
        raise


def files_in_deepspeed(directory: Path) -> list[Path]:
    """Return the files of a checkpoint: those of its folder, and the file `latest` next to it."""
    folder = tagged_folder(directory)
    extra = [] if folder == directory else [_latest(directory)]
    return [*extra, *sorted(path for path in folder.iterdir() if path.is_file())]


def shapes_in_deepspeed(directory: Path) -> dict[Path, dict[Keys, tuple[int, ...]]]:
    """Return the shapes of the tensors in each file of the model and the optimizer, by their paths of keys.

    The partitions that hold the weights are left out.

    Raises:
        CandidateError: a file cannot be read.
    """
    files = _Files(tagged_folder(directory))
    partitions = {(_STATE, key) for key in _PARTITIONS}
    paths = [files.folder / name for name in (*files.model.values(), *files.optimizer.values())]
    return {
        path: {keys: shape for keys, shape in shapes_in(path).items() if keys[:2] not in partitions} for path in paths
    }


def storages_in_deepspeed(directory: Path) -> dict[str, list[Placeable]]:
    """Return all tensors that hold each weight of a checkpoint, by name.

    The first is the one that candidates read. With ZeRO-1 and 2, trained parameters are also in the model's file, in
    the dtype of the model, and that of ZeRO-2 holds frozen parameters twice; with ZeRO-3, buffers are in the model's
    file of every rank.
    """
    files = _Files(tagged_folder(directory))
    try:
        tensors = _tensors(files)
        storages: dict[str, list[Placeable]] = {name: [tensor] for name, tensor in tensors.items()}
        in_parts = _stage(_optimizer_state(files, 0) if files.optimizer else {}) == 3
        for rank in files.model:
            path, state = _model_state(files, rank)
            # With ZeRO-3, parameters are empty in `module`, and the parts of frozen ones are the tensors themselves.
            # Otherwise, DeepSpeed loads frozen parameters from the whole ones next to `module`.
            for copies in (state["module"], {} if in_parts else _fragments(path, state)):
                for name, copy in dense_tensors(copies, path, _CONVERT).items():
                    if name in tensors and copy.shape == tensors[name].shape and _is_further(copy, storages[name]):
                        storages[name].append(copy)
    finally:
        files.close()  # a later read opens them again
    return storages


def tagged_folder(directory: Path) -> Path:
    """Return the folder of a step: the directory itself, or the subfolder that its file `latest` names."""
    latest = _latest(directory)
    if any(directory.glob("*_model_states.pt")) or not latest.is_file():
        return directory
    tag = read_bounded(latest, _MAX_TAG_LENGTH).decode(errors="replace").strip()
    if not tag or Path(tag).name != tag or not (directory / tag).is_dir():
        folders = sorted(path.name for path in directory.iterdir() if path.is_dir())
        raise CandidateError(
            f"{latest}: names {tag!r}, but the directory has no such folder; it has {quoted(folders) or 'none'}. Copy "
            "that folder too, or give the folder of another step."
        )
    return directory / tag


def _latest(directory: Path) -> Path:
    """Return the file with the name of the last folder, of checkpoints or otherwise of universal checkpoints."""
    return directory / ("latest" if (directory / "latest").is_file() else LATEST)


class _Files:
    """The files of a checkpoint by rank. A file is opened at its first read."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.label = str(folder)
        self._open: list[File] = []
        names = sorted(path.name for path in folder.iterdir())
        for pattern, feature in _UNSUPPORTED.items():
            if match := next((name for name in names if pattern.fullmatch(name)), None):
                raise CandidateError(
                    f"{folder}: holds {match!r}, a part of {feature}, which is not supported. {_CONVERT}"
                )
        self.model = self._by_rank(names, _MODEL)
        self.optimizer = self._by_rank(names, _OPTIMIZER)
        self.content = lru_cache(maxsize=None)(self._content)
        if not self.model:
            raise CandidateError(f"{folder}: has no *_model_states.pt. Copy the whole folder again.")

    @property
    def universal(self) -> bool:
        """Whether the weights are in one file for each parameter instead of the optimizer's partitions."""
        return not self.optimizer and is_universal(self.folder)

    def _by_rank(self, names: Sequence[str], pattern: re.Pattern[str]) -> dict[int | None, str]:
        """Return file names by rank. The key of a file that holds the state of all ranks is None."""
        result: dict[int | None, str] = {}
        for name in names:
            if not (match := pattern.fullmatch(name)):
                continue
            if int(match["slice"]):
                raise CandidateError(
                    f"{self.folder}: holds {name!r}: the model was split by tensor or model parallelism, which is not "
                    f"supported. {_CONVERT}"
                )
            rank = None if match["rank"] is None else int(match["rank"])
            if rank in result:
                raise CandidateError(
                    f"{self.folder}: holds both {result[rank]!r} and {name!r}; all files must come from the same save. "
                    "Remove the files of the other save."
                )
            result[rank] = name
        return result

    def _content(self, name: str) -> Any:
        file = File(self.folder / name)
        self._open.append(file)
        return Archive(file).content()

    def state(self, name: str) -> dict[str, Any]:
        """Return the content of a file of the model or the optimizer."""
        content = self.content(name)
        if not isinstance(content, dict):
            path = self.folder / name
            raise CandidateError(f"{path}: does not hold a dict, as files of DeepSpeed do. Copy it again.")
        return content

    def __iter__(self) -> Any:
        return iter(self._open)

    def close(self) -> None:
        for file in self._open:
            file.close()


def _tensors(files: _Files) -> dict[str, Stored | ConcatenatedTensor]:
    optimizer = _optimizer_state(files, 0) if files.optimizer else {}
    in_parts = not optimizer and None not in files.model  # without its optimizer, a folder may be universal
    stage = 3 if in_parts else _stage(optimizer)
    path, model = _model_state(files, 0 if stage == 3 else None)
    _refuse_unsupported(path, model, optimizer)
    shapes = model.get("param_shapes")
    if not optimizer and not files.universal:
        if shapes is not None:
            raise CandidateError(
                f"{files.folder}: was saved with ZeRO, but has no *_optim_states.pt, which hold the weights. Copy the "
                "whole folder again."
            )
        return {**dense_tensors(model["module"], path, _CONVERT)}
    if not isinstance(shapes, list):
        raise CandidateError(f"{path}: has no list 'param_shapes'; it is from another save. Copy the folder again.")
    world = len(files.model) if files.universal else _world(files, optimizer)
    trained = _trained(files, optimizer, [_shapes(group) for group in shapes], stage, world)
    if stage == 3:
        tensors = {**_rest_of_stage_3(files, model, path, world), **trained}
    else:
        # The model file holds all tensors in the dtype of the model. Frozen parameters and buffers are only there; the
        # optimizer files have the others at higher precision.
        of_model = dense_tensors(model["module"], path, _CONVERT)
        if files.universal:
            require_same(files.folder, trained, of_model)
        tensors = {**of_model, **trained}
    tied = {text(name): text(source) for name, source in (model.get("shared_params") or {}).items()}
    for name, source in tied.items():
        if source in tensors and (name not in tensors or tensors[name].shape == tensors[source].shape):
            tensors[name] = tensors[source]
    return tensors


def _trained(
    files: _Files, optimizer: Mapping[str, Any], groups: Sequence[Mapping[str, tuple[int, ...]]], stage: int, world: int
) -> Mapping[str, Stored | ConcatenatedTensor]:
    """Return the trained parameters, in float32, from the files of the optimizer or of a universal checkpoint.

    Args:
        files: the files.
        optimizer: the state of the optimizer of rank 0; empty for a universal checkpoint.
        groups: the shapes of the parameters of each parameter group.
        stage: the stage of ZeRO.
        world: the number of ranks that saved.
    """
    merged = {name: shape for group in groups for name, shape in group.items()}
    if files.universal:
        return universal_weights(files.folder, merged, files.content)
    if stage == 3:
        return split_parameters(merged, _partitions(files, _PARTITIONS[1]), world, files.label)
    paddings = [_sizes(group) for group in optimizer.get("param_alignment_paddings") or ()]
    return split_groups(groups, paddings, _partitions(files, _PARTITIONS[0]), world, files.label)


def _rest_of_stage_3(
    files: _Files, model: Mapping[str, Any], path: Path, world: int
) -> dict[str, Stored | ConcatenatedTensor]:
    """Return buffers and frozen parameters of ZeRO-3. In the model file, parameters are empty and buffers are whole."""
    buffers = {text(name) for name in model.get("buffer_names") or ()}
    frozen = _shapes(model.get("frozen_param_shapes") or {})

    def fragments(rank: int) -> Mapping[str, Stored]:
        held_in, state = _model_state(files, rank)
        parts = _fragments(held_in, state)
        for name, shape in frozen.items():
            stored, part = parts.get(name), -(-prod(shape) // world)
            if not isinstance(stored, Stored) or stored.numel < min(part, prod(shape) - rank * part):
                raise CandidateError(
                    f"{held_in}: has no part of the frozen parameter {name!r} of shape {tuple(shape)}. All files must "
                    "come from the same save: copy the checkpoint again."
                )
        return parts

    return {
        **dense_tensors({name: value for name, value in model["module"].items() if name in buffers}, path, _CONVERT),
        **split_fragments(frozen, fragments, world),
    }


def _fragments(path: Path, state: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the frozen parameters of the file of a model: parts of them with ZeRO-3, else whole ones."""
    frozen = state.get("frozen_param_fragments") or {}
    if not isinstance(frozen, dict):
        raise CandidateError(f"{path}: its 'frozen_param_fragments' is not a dict. Copy the checkpoint again.")
    return frozen


def _is_further(copy: Stored, storages: Sequence[Placeable]) -> bool:
    """Return whether the bytes of a tensor are none of these places."""
    stored = [storage for storage in storages if isinstance(storage, Stored)]
    return (copy.record.file, copy.memory_key) not in [(storage.record.file, storage.memory_key) for storage in stored]


def _shapes(group: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    return {text(name): _sizes(shape) for name, shape in group.items()}


def _sizes(value: Any) -> tuple[int, ...]:
    sizes = integers(value)
    if min(sizes, default=0) < 0:
        raise ValueError(f"{brief(sizes)} has a negative number")
    return sizes


def _stage(optimizer: Mapping[str, Any]) -> int:
    """Return the stage of ZeRO, 0 without ZeRO."""
    return int(optimizer.get("zero_stage", 1)) if optimizer else 0


def _world(files: _Files, optimizer: Mapping[str, Any]) -> int:
    """Return the number of ranks that saved the checkpoint, and check that the files of all ranks exist."""
    counts = optimizer.get("partition_count")
    counts = counts if isinstance(counts, list) else [counts]
    if not counts or any(type(count) is not int or count != counts[0] or count < 1 for count in counts):
        raise CandidateError(
            f"{files.folder / files.optimizer[0]}: its parameter groups are split over {brief(counts)} ranks; all must "
            f"be split over the same ranks (no MoE). {_CONVERT}"
        )
    world: int = counts[0]
    # A damaged file can claim any number of ranks. If any rank is missing, one of the first `checked` is.
    checked = min(world, len(files.optimizer) + 8)
    missing = [rank for rank in range(checked) if rank not in files.optimizer]
    extra = [rank for rank in files.optimizer if rank is None or rank >= world]
    if missing or extra:
        problem = (
            f"those of ranks {quoted(map(str, missing))} are missing" if missing else f"there are {len(extra)} more"
        )
        raise CandidateError(
            f"{files.folder}: was saved by {world} ranks, each with its *_optim_states.pt, but {problem}. Copy the "
            "checkpoint again as one folder, or leave this candidate out."
        )
    return world


def _partitions(files: _Files, key: str) -> Any:
    def partitions(rank: int) -> Sequence[Stored]:
        state = _optimizer_state(files, rank)
        partition = state.get(key)
        if not isinstance(partition, list) or not all(isinstance(part, Stored) for part in partition):
            raise CandidateError(
                f"{files.folder / files.optimizer[rank]}: has no list of tensors {key!r}: its weights were offloaded "
                "to disk, or another version of DeepSpeed wrote it. Convert it with DeepSpeed's zero_to_fp32.py."
            )
        return partition

    return partitions


def _optimizer_state(files: _Files, rank: int) -> Mapping[str, Any]:
    if rank not in files.optimizer:
        raise CandidateError(f"{files.folder}: has no *_optim_states.pt of rank {rank}. Copy the folder again.")
    state = files.state(files.optimizer[rank]).get(_STATE)
    if not isinstance(state, dict):
        raise CandidateError(
            f"{files.folder / files.optimizer[rank]}: has no dict {_STATE!r}, as files of DeepSpeed do. Copy it again."
        )
    return state


def _model_state(files: _Files, rank: int | None) -> tuple[Path, Mapping[str, Any]]:
    if rank not in files.model:
        prefix = "" if rank is None else f"zero_pp_rank_{rank}_"
        raise CandidateError(f"{files.folder}: has no {prefix}mp_rank_00_model_states.pt. Copy the folder again.")
    path = files.folder / files.model[rank]
    state = files.state(files.model[rank])
    if not isinstance(state.get("module"), dict):
        raise CandidateError(f"{path}: has no dict 'module', as files of DeepSpeed do. Copy it again.")
    return path, state


def _refuse_unsupported(path: Path, model: Mapping[str, Any], optimizer: Mapping[str, Any]) -> None:
    unsupported = {
        "model parallelism": (model.get("mp_world_size") or 1) > 1,
        "expert parallelism": bool(
            model.get("ds_autoep_layers") or model.get("autoep_layers") or optimizer.get("ds_zero_partition_groups")
        ),
    }
    for kind, used in unsupported.items():
        if used:
            raise CandidateError(f"{path}: the model was split by {kind}, which is not supported. {_CONVERT}")
