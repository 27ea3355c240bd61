"""Checkpoints of Megatron-LM and NeMo: torch.distributed.checkpoint with a common part (`torch_dist`)."""

import re
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from twa_scale.base.inputs import read_bounded
from twa_scale.candidates.formats.origin import Keys
from twa_scale.errors import CandidateError

COMMON = "common.pt"
"""The part that is equal on all ranks: arguments, counters, the settings of the optimizer."""
BACKEND = "metadata.json"
"""The file with the format of the tensors."""
TRACKER = "latest_checkpointed_iteration.txt"
"""The file with the name of the last folder of an iteration, next to the folders."""
_MAX_TRACKER_BYTES = 64  # bytes of the tracker

_CHAIN = re.compile(r"chained_\d+\.(?=optimizer\.)")  # one of several optimizers: experts have their own
_COPY = re.compile(r"(chained_\d+\.)?optimizer\.state\.(fp32_param|param|master_param)\.(?P<weight>.+)")
_BUFFER = re.compile(
    r"(chained_\d+\.)?optimizer\.distributed\.(.+\.bucket_idx_\d+\.(param|master_param)|[^.]+\.param_state(/.*)?)"
)


def is_megatron(directory: Path) -> bool:
    """Return whether a directory has the common part of a checkpoint of Megatron-LM."""
    return (directory / COMMON).is_file() and (directory / BACKEND).is_file()


def other_megatron_format(directory: Path) -> str | None:
    """Return the problem of a checkpoint of Megatron-LM that is not in the format `torch_dist`, or None."""
    fix = (
        "Write it in the format torch_dist: load it in Megatron-LM with --ckpt-convert-format torch_dist "
        "--ckpt-convert-save DIR."
    )
    if any(directory.glob("mp_rank_*/*model_*_rng.pt")) or any(directory.glob("mp_rank_*/model_rng.pt")):
        return f"is a checkpoint of Megatron-LM in its format 'torch', with a file of each rank. {fix}"
    if is_megatron(directory):
        return (
            "has the common part of a checkpoint of Megatron-LM, but no .metadata: the save was not finished, or the "
            f"tensors are in another format, such as zarr. Leave this candidate out if the save failed. {fix}"
        )
    return None


def latest_iteration(directory: Path) -> Path | None:
    """Return the folder of the iteration that the tracker of a directory names, or None without a tracker.

    Raises:
        CandidateError: the tracker names no folder, or the folder is missing.
    """
    tracker = directory / TRACKER
    if not tracker.is_file():
        return None
    content = read_bounded(tracker, _MAX_TRACKER_BYTES).decode(errors="replace").strip()
    folder = directory / (f"iter_{int(content):07d}" if re.fullmatch(r"[0-9]{1,18}", content) else "release")
    if not folder.is_dir() or (folder.name == "release" and content != "release"):
        raise CandidateError(
            f"{tracker}: names the iteration {content!r}, but there is no folder {folder.name!r} next to it. Copy that "
            "folder too, or give the folder of the iteration that is meant."
        )
    return folder


def copies_of_weights(weights: Collection[Keys], stored: Mapping[Keys, Sequence[int]]) -> dict[Keys, list[Keys]]:
    """Return the copies of each weight in a checkpoint: the float32 copies of the optimizer, under its key.

    If the chosen weights are these copies, the weights of the model are returned. Tensors of other shapes are left out.

    Args:
        weights: the paths of keys of the weights.
        stored: the shapes of all tensors, by their paths of keys.
    """
    same_shape: dict[str, list[Keys]] = defaultdict(list)
    for keys in stored:
        same_shape[weight_of_copy(keys) or ".".join(keys)].append(keys)
    return {
        keys: [
            other
            for other in same_shape[weight_of_copy(keys) or ".".join(keys)]
            if other != keys and stored[other] == stored[keys]
        ]
        for keys in weights
    }


def weight_of_copy(keys: Keys) -> str | None:
    """Return the name of the weight of which a tensor is the optimizer's copy, or None if it is not a copy."""
    match = _COPY.fullmatch(".".join(keys))
    return match["weight"] if match else None


def without_chain(keys: Keys) -> Keys:
    """Return a path of keys without the number of one of several optimizers."""
    return (_CHAIN.sub("", keys[0], count=1), *keys[1:])


def flat_buffer(entries: Collection[str]) -> str | None:
    """Return the entry of a checkpoint that is a part of the distributed optimizer's flat copy of the weights.

    Such a part has neither the names nor the shapes of weights. Return None if no entry is such a part.
    """
    return next((entry for entry in sorted(entries) if _BUFFER.fullmatch(entry)), None)
