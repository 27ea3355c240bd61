"""Further copies of the weights in a checkpoint, from which training would resume instead of from the average."""

import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path

from twa_scale.base.names import quoted, without_wrappers
from twa_scale.candidates import Candidate
from twa_scale.candidates.directory import is_averaged, is_of_fsdp, is_torch
from twa_scale.candidates.entries import is_optimizer_entry
from twa_scale.candidates.formats.dcp import METADATA, DcpFolder
from twa_scale.candidates.formats.megatron import copies_of_weights, flat_buffer, weight_of_copy
from twa_scale.candidates.formats.origin import Keys, Origin
from twa_scale.candidates.formats.rank_files import is_rank_file
from twa_scale.candidates.formats.torch_file import shapes_in
from twa_scale.candidates.weights_key import LIGHTNING_AVERAGE
from twa_scale.errors import CandidateError, OutputError

Shape = tuple[int, ...]
_MASTER = re.compile(
    r"fp32_from_fp16\w*|fp32_from_float16\w*|fp32_params?|fp32_groups\w*|fp32_flat_groups|master_(weight|param)s?|"
    r"single_partition_of_fp32_groups"
)
_SLOW = re.compile(r"slow_(buffer|params?|weights?)")
_ARCHIVE = b"PK\x03\x04"
_FIX = "Choose --format hf, dcp or pt (format=), and start with a new optimizer"


def check_other_copies(
    last: Candidate,
    origin: Origin,
    own_shapes: Mapping[Path, Mapping[Keys, Shape]],
    extra_files: Sequence[tuple[str, Path]],
    notify: Callable[[str], None],
) -> None:
    """Check that a training that resumes from copies of these files uses only weights that are replaced.

    Args:
        last: the candidate.
        origin: the positions in its files of the weights that are replaced.
        own_shapes: the shapes of the tensors in its files, by their paths of keys.
        extra_files: the files that are copied unchanged, by their path in the directory.
        notify: called with each notice for the user.

    Raises:
        OutputError: another file also contains the weights, or an optimizer has its own copy of them.
    """
    label, weight_files = last.label, {path.name for path in origin.keys}
    for name, path in extra_files:
        if is_rank_file(path) or (is_of_fsdp(outer := Path(name).parts[0]) and outer not in weight_files):
            raise OutputError(_stored_twice(label, name))
    shapes_by_file = {str(path): shapes for path, shapes in own_shapes.items()}
    others, unread = _read(extra_files)
    _require_no_master(label, {**shapes_by_file, **others})
    weights = {name: last.shape(name) for name in last.names()}
    copies = {name: stored for name, shapes in others.items() if (stored := _copies_of(weights, shapes))}
    if 2 * len(set().union(*copies.values())) >= max(1, len(weights)):
        raise OutputError(_stored_twice(label, next(iter(copies))))
    if origin.nesting != (LIGHTNING_AVERAGE,) and any(
        keys[0] == LIGHTNING_AVERAGE for stored in shapes_by_file.values() for keys in stored
    ):
        notify(
            f"{label}: Lightning's WeightAveraging resumes from {LIGHTNING_AVERAGE!r}, which stays that of the last "
            f"candidate. Set `weights_key: {LIGHTNING_AVERAGE}` (--weights-key) to average that."
        )
    all_keys = [keys for shapes in (*shapes_by_file.values(), *others.values()) for keys in shapes]
    if slow := sorted({".".join(keys) for keys in all_keys if _is_slow(keys)}):
        notify(
            f"{label}: {quoted(slow)} are weights that the optimizer keeps (Lookahead, schedule-free). They remain "
            f"those of the last candidate, and training continues from both. {_FIX}, if this is not intended."
        )
    if unread:
        notify(
            f"{label}: {quoted(unread)} cannot be read and are copied unchanged. If they contain weights, training may "
            "resume from those instead of the average."
        )


def _require_no_master(label: str, files: Mapping[str, Mapping[Keys, Shape]]) -> None:
    """Check that no optimizer has its own copy of weights.

    Args:
        label: the candidate.
        files: the shapes of the tensors of each file, by their paths of keys.

    Raises:
        OutputError: names the file and the copy.
    """
    for name, shapes in files.items():
        if master := next((".".join(keys) for keys in shapes if _has(_MASTER, keys)), None):
            raise OutputError(
                f"{label}: {name} holds {master!r}, the optimizer's copy of weights, from which training would resume, "
                f"and not from the average. {_FIX}."
            )


def _stored_twice(label: str, name: str) -> str:
    return (
        f"{label}: {name!r} holds the weights too. --format same (format='same') would keep those of the last "
        f"candidate there, and training may resume from them. {_FIX}; or remove {name!r} if nothing loads it."
    )


def _read(extra_files: Sequence[tuple[str, Path]]) -> tuple[dict[str, Mapping[Keys, Shape]], list[str]]:
    """Return the shapes of the tensors in files of torch, and the names of those that cannot be read."""
    shapes: dict[str, Mapping[Keys, Shape]] = {}
    unread = []
    for name, path in extra_files:
        folder = path.name == METADATA
        if is_averaged(name) or not (folder or _is_archive(path)):
            if is_torch(name) and not is_averaged(name):
                unread.append(name)
            continue
        try:
            shapes[name] = stored_shapes(path.parent if folder else path)
        except CandidateError:
            unread.append(name)
    return shapes, unread


def other_tensors(path: Path, weights: Collection[Keys]) -> Mapping[Keys, Shape]:
    """Return the shapes of the tensors in a file of weights; of a folder of DCP, only those that `same` does not write.

    Args:
        path: a file of torch.save, or a folder of DCP.
        weights: the paths of keys of the weights.

    Raises:
        OutputError: `same` would not write all weights of the model, or all copies that Megatron-LM's optimizer has.
    """
    if not path.is_dir():
        return shapes_in(path)
    folder = DcpFolder(path)
    if buffer := flat_buffer(folder.entries):
        raise OutputError(
            f"{path}: holds {buffer!r}, a flat buffer with the distributed optimizer's copy of weights, from which "
            "training would resume, and not from the average. Save checkpoints with "
            f"--dist-ckpt-optim-fully-reshardable, which keeps this copy by name. {_FIX}."
        )
    written = set(weights).union(*copies_of_weights(weights, folder.shapes).values())
    others = {keys: shape for keys, shape in folder.shapes.items() if keys not in written}
    _require_all_written(path, weights, others, folder.shapes)
    return others


def _require_all_written(
    path: Path, weights: Collection[Keys], others: Mapping[Keys, Shape], all_keys: Collection[Keys]
) -> None:
    """Check that `same` writes each copy that the optimizer has of a weight, and with copies each weight of the model.

    Args:
        path: the folder of DCP.
        weights: the paths of keys of the weights.
        others: the shapes of the tensors that are not written, by their paths of keys.
        all_keys: the paths of keys of all tensors.

    Raises:
        OutputError: a copy or a weight is not written. The message names it.
    """
    of_optimizer = any(map(weight_of_copy, weights))
    fix = _FIX
    if of_optimizer:
        fix += (
            "; or leave out `weights_key`, or set it to optimizer.state.param or optimizer.state.fp32_param, which "
            "takes the copies of all optimizers"
        )
    copies = {keys: weight for keys in others if (weight := weight_of_copy(keys))}
    if copies:  # A module may be called `param`: its state in the optimizer is no copy.
        of_model = {end for keys in all_keys if not is_optimizer_entry(keys) for end in _ends(".".join(keys))}
        if copy := next((keys for keys, weight in sorted(copies.items()) if weight in of_model), None):
            raise OutputError(
                f"{path}: holds {'.'.join(copy)!r}, the optimizer's copy of weights, from which training would resume, "
                f"and not from the average, in which no tensor has this name and the shape {others[copy]}. {fix}."
            )
    if of_optimizer and (old := min((keys for keys in others if not is_optimizer_entry(keys)), default=None)):
        raise OutputError(
            f"{path}: holds {'.'.join(old)!r} of the model, of which no optimizer's copy of the same shape is among "
            f"the weights that are averaged: it would stay that of the last candidate. {fix}."
        )


def stored_shapes(path: Path) -> Mapping[Keys, Shape]:
    """Return the shapes of the tensors in a file of torch.save or a folder of DCP, by their paths of keys."""
    return DcpFolder(path).shapes if path.is_dir() else shapes_in(path)


def _is_archive(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(len(_ARCHIVE)) == _ARCHIVE


def _copies_of(weights: Mapping[str, Shape], shapes: Mapping[Keys, Shape]) -> set[str]:
    """Return the weights that a file contains with their names, below any keys."""
    joined = {".".join(keys): shape for keys, shape in shapes.items() if not is_optimizer_entry(keys)}
    plain = without_wrappers(joined)
    return {
        name
        for raw, shape in joined.items()
        if not is_averaged(raw)
        for name in _ends(plain[raw])
        if weights.get(name) == shape
    }


def _ends(name: str) -> Iterator[str]:
    parts = name.split(".")
    return (".".join(parts[i:]) for i in range(len(parts)))


def _has(pattern: re.Pattern[str], keys: Keys) -> bool:
    return any(pattern.fullmatch(part) for key in keys for part in key.split("."))


def _is_slow(keys: Keys) -> bool:
    parts = ".".join(keys).split(".")
    return _has(_SLOW, keys) or (parts[-1] == "z" and "state" in parts)
