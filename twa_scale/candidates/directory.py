"""Find the file with the weights of a directory, as the library that wrote the directory does."""

import re
from pathlib import Path
from typing import TypeVar

from twa_scale.base.names import quoted
from twa_scale.base.urls import Url
from twa_scale.candidates.formats.dcp_safetensors import is_rank_shard
from twa_scale.candidates.formats.megatron import is_megatron, latest_iteration
from twa_scale.candidates.formats.sharded import weight_map
from twa_scale.errors import CandidateError

AnyPath = TypeVar("AnyPath", Path, Url)

INDEX = ".index.json"
TORCH_SUFFIXES = (".pt", ".pth", ".pth.tar", ".bin", ".ckpt")
LOADERS = {
    "transformers": (
        "model.safetensors",
        "model.safetensors.index.json",
        "pytorch_model.bin",
        "pytorch_model.bin.index.json",
    ),
    "diffusers": (
        "diffusion_pytorch_model.safetensors.index.json",
        "diffusion_pytorch_model.safetensors",
        "diffusion_pytorch_model.bin.index.json",
        "diffusion_pytorch_model.bin",
    ),
    "open_clip": ("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors", "open_clip_pytorch_model.bin"),
    "peft": ("adapter_model.safetensors", "adapter_model.bin"),
}
"""The names of files of weights, in the order in which each library looks for them in a directory."""

_FSDP_FILE = "pytorch_model_fsdp.bin"
"""The whole model that Accelerate writes under FSDP."""
_NEMO_FOLDER = "weights"
_FSDP_FOLDER = re.compile(r"pytorch_model(_fsdp)?_\d+")
_FSDP_RANK = re.compile(r"pytorch_model(_fsdp)?(_\d+)?_rank\d+\.bin")
_FURTHER_MODEL = re.compile(r"(model|pytorch_model|pytorch_model_fsdp)_[1-9]\d*\.(safetensors|bin)")
"""Accelerate's names of all models except the first one that one program trains."""
_SHARD = re.compile(r"-(\d{5,})-of-(\d{5,})\.")
_VARIANT = re.compile(r"(?P<stem>.+)\.(fp|bf|float|bfloat|int)\d\w*(?P<suffix>\.[^.]+)?(\.index\.json)?")
_AVERAGED = re.compile(r"(?<![a-z])(ema|swa|polyak|averaged?|avg)(?![a-z])")
# "avg_loss=0.3" and "val-avg-0.3" name an average of numbers, where "ema-0.999" and "avg_10" name one of weights.
_METRIC = re.compile(
    r"(?<![^-=/. ])(?!(ema|swa|polyak)([-_](decay|rate))?=)[^-=/. ]*=[^-=_ ]*"
    r"|(?<![a-z])(averaged?|avg)[-_. =]?\d*\.\d+"
    r"|(?<![a-z])(averaged?|avg)[-_. ]({0})(?![a-z])"
    r"|(?<![a-z])({0})[-_. ](averaged?|avg)(?![a-z])".format(
        "loss|acc|accuracy|score|reward|return|error|err|f1|val|valid|validation|train|training|test|eval|dev|metric|"
        "ppl|perplexity|bleu|rouge|wer|cer|iou|dice|auc|map|psnr|recall|precision|mse|mae|rmse|nll|grad|length|pool"
    )
)


def weights_in(directory: AnyPath) -> AnyPath | None:
    """Return the file or index with the weights of a directory, or None if it is not known.

    Raises:
        CandidateError: the directory has weights of several libraries, so that the choice is ambiguous.
    """
    names = files_in(directory)
    by_library = {library: next((name for name in order if name in names), None) for library, order in LOADERS.items()}
    known = {library: name for library, name in by_library.items() if name}
    if len(known) > 1:
        raise CandidateError(
            f"{directory}: holds {' and '.join(f'{name!r} ({library})' for library, name in known.items())}; a "
            "directory that is a candidate holds one set of weights. Name the file that is meant."
        )
    if known:
        return directory / next(iter(known.values()))
    if _FSDP_FILE in names:
        return directory / _FSDP_FILE
    others = [name for name in names if _is_other(name)]
    if len(indices := [name for name in others if name.endswith(INDEX)]) == 1:
        parts = set(weight_map(directory / indices[0]).values())
        others = [name for name in others if name not in parts]
        names = [name for name in names if name not in parts]
    is_single = len(others) == 1 and not any(
        name.lower().endswith(".safetensors") for name in names if name != others[0]
    )
    return directory / others[0] if is_single else None


def sharded_in(directory: Path) -> Path | None:
    """Return the folder of torch.distributed.checkpoint that holds the weights of a directory.

    Under FSDP, Accelerate and Trainer write one. NeMo writes the folder `weights`. Megatron-LM writes folders of
    iterations, and a file next to them with the name of the last one.

    Raises:
        CandidateError: the directory has folders of several models or files of single ranks, or a folder is missing.
    """
    entries = sorted(directory.iterdir())
    if is_megatron(directory / _NEMO_FOLDER):
        return directory / _NEMO_FOLDER
    if iteration := latest_iteration(directory):
        return iteration
    folders = [path for path in entries if _FSDP_FOLDER.fullmatch(path.name) and path.is_dir()]
    if len(folders) > 1:
        raise CandidateError(
            f"{directory}: holds {quoted([path.name for path in folders])}, one folder for each model that Accelerate "
            "has saved. Name the folder that is meant."
        )
    if folders:
        return folders[0]
    if rank := next((path.name for path in entries if _FSDP_RANK.fullmatch(path.name)), None):
        raise CandidateError(
            f"{directory}: holds {rank!r}, which has one rank's part of flat parameters (LOCAL_STATE_DICT), without "
            "their names and shapes. Save with fsdp_state_dict_type SHARDED_STATE_DICT or FULL_STATE_DICT."
        )
    return None


def is_of_fsdp(name: str) -> bool:
    """Return whether Accelerate saves and loads weights of FSDP under this name of a file or folder."""
    return name == _FSDP_FILE or bool(_FSDP_FOLDER.fullmatch(name) or _FSDP_RANK.fullmatch(name))


def unused_files(directory: Path | Url, chosen: Path | Url) -> list[str]:
    """Return the other files of weights in a directory that a user may have meant.

    Torch files of the same weights, and files of another precision (`model.fp16.safetensors`), are left out.
    """
    if chosen.name != _FSDP_FILE and not any(chosen.name in order for order in LOADERS.values()):
        return []
    parts = set(weight_map(chosen).values()) if chosen.name.endswith(INDEX) else set()
    other_name = chosen.name.removesuffix(INDEX) if chosen.name.endswith(INDEX) else chosen.name + INDEX
    return [
        name
        for name in files_in(directory)
        if name not in parts
        and not is_shard(name)
        and name != chosen.name
        and (
            name == other_name
            or (is_averaged(name) and is_weights(name))
            or _FURTHER_MODEL.fullmatch(name)
            or (_is_other(name) and not is_variant(name, chosen.name))
        )
    ]


def is_weights(name: str) -> bool:
    """Return whether a file has the name of a file of weights."""
    return is_torch(name) or name.lower().endswith((".safetensors", INDEX))


def is_torch(name: str) -> bool:
    """Return whether a file has the name of a file of torch.save."""
    return name.lower().endswith(TORCH_SUFFIXES)


def is_shard(name: str) -> bool:
    """Return whether a file has the name of a shard, which is listed by an index."""
    match = _SHARD.search(name)
    return match is not None and int(match[2]) > 1 and not name.endswith(INDEX)


def is_averaged(name: str) -> bool:
    """Return whether a file has the name of an average of weights, such as `ema.safetensors`."""
    return _AVERAGED.search(_METRIC.sub("", name.lower())) is not None


def is_variant(name: str, plain: str) -> bool:
    """Return whether two files hold a model in different precisions: `model.fp16.safetensors`, `model.safetensors`."""
    return plain in plain_names(name)


def plain_names(name: str) -> tuple[str, ...]:
    """Return the possible names of a file of weights without the precision in its name; empty if it has none."""
    match = _VARIANT.fullmatch(name)
    plain = f"{match['stem']}{match['suffix'] or ''}" if match else ""
    return (plain, plain + INDEX) if match else ()


def files_in(directory: Path | Url) -> list[str]:
    """Return the names of the regular files of a directory that are not hidden."""
    return sorted(path.name for path in directory.iterdir() if path.is_file() and not path.name.startswith("."))


def _is_other(name: str) -> bool:
    """Return whether a file of weights has a name that no library looks for."""
    if is_rank_shard(Path(name)) or is_shard(name) or any(name in order for order in LOADERS.values()):
        return False
    return name.lower().endswith((".safetensors", ".safetensors" + INDEX, ".bin" + INDEX))
