"""The small files of a candidate that an output copies, such as its configuration and tokenizer."""

import json
import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch

from twa_scale.base.inputs import open_regular, parse_json
from twa_scale.base.names import quoted
from twa_scale.base.notices import notice
from twa_scale.candidates.formats.deepspeed_universal import LATEST
from twa_scale.candidates.formats.megatron import BACKEND, TRACKER, is_megatron
from twa_scale.errors import CandidateError

MAX_BYTES = 64 << 20
"""The largest number of bytes of one file: tokenizers of large vocabularies have about 40 MB."""
MAX_TOTAL = 256 << 20
"""The largest number of bytes of all files, which are in memory until the output is written."""
MAX_FILES = 1000
MAX_DEPTH = 4
"""The largest number of folders between the candidate's directory and a file."""
_MAX_ENTRIES = 20_000  # entries of subfolders to visit

_WEIGHTS = re.compile(
    r".*\.(safetensors|bin|pt|pth|ckpt|distcp|pkl|pickle|joblib|h5|hdf5|keras|msgpack|ot|npz|npy|onnx|onnx_data\S*|gguf|"
    r"ggml|tflite|pb|mlmodel|engine|plan|params|pdparams|nemo|mar|zip|tar|gz|xz|zst)"
    r"|.*\.index(\.[\w-]+)?\.json|openvino_\S+\.xml",
    re.IGNORECASE,
)
"""Weights of any format, archives, and indices of weights."""
_STATE = (
    "optimizer.*",
    "scheduler.*",
    "rng_state*",
    "random_states*",
    "trainer_state.json",
    "training_args.*",
    "*_results.json",
    "latest",
    LATEST,
    TRACKER,
    "events.out.tfevents*",
    "*.log",
    "twa_scale.json",
)
"""The state and the records of the training that wrote the candidate."""
_CODE = re.compile(r".*\.(py|pyc|pyd|so|dll|dylib|sh|ipynb)", re.IGNORECASE)
_DEEPSPEED_FILES = ("zero_to_fp32.py", "zero_to_torch.py")  # scripts that only read checkpoints of DeepSpeed
NO_FOLDER = ("__pycache__", "runs", "logs", "wandb")
"""Folders that are never copied."""

_LINK = "a link that leads out of the directory, or to a folder"
_LARGE = f"more than {MAX_BYTES >> 20} MiB, or than {MAX_FILES} files or {MAX_TOTAL >> 20} MiB in all"


def side_files(
    directory: Path | None, *, code: bool = False, notify: Callable[[str], None] = notice
) -> dict[str, bytes]:
    """Return the content of the small files of a candidate by their path in its directory.

    It reads regular files, and links to regular files within the directory (in the cache of the Hugging Face hub:
    within the repository). It skips hidden files, weights in any format, training state, code by default, and folders
    with weights.

    Args:
        directory: the directory of a candidate; None has no files.
        code: whether to include code, which loaders may run.
        notify: called with one line for each reason why a file that an output may need was skipped.
    """
    if directory is None:
        return {}
    scan = _FileScan(directory, code)
    for name, path in scan.files(directory, 0):
        scan.read(name, path)
    for reason, names in scan.left_out.items():
        notify(f"{directory}: left out of the output: {quoted(sorted(names))} ({reason}).")
    return scan.content


@dataclass
class _FileScan:
    """The files of a directory: the content of those that are copied, and the names of the others by reason."""

    directory: Path
    code: bool
    content: dict[str, bytes] = field(default_factory=dict)
    left_out: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    _num_entries: int = 0
    _total: int = 0

    def __post_init__(self) -> None:
        self._root = root_of_links(self.directory.resolve())
        self._modules = _modules(self.directory / "modules.json")

    def files(self, folder: Path, depth: int) -> Iterator[tuple[str, Path]]:
        """Yield the name and the path of every file to read; files of a folder before those of its subfolders."""
        folders = []
        try:
            entries = sorted(folder.iterdir())
        except OSError as error:
            self.left_out[error.strerror or str(error)].append(folder.name)
            return
        for path in entries:
            name = str(path.relative_to(self.directory))
            self._num_entries += bool(depth)
            if path.is_dir():
                folders.append((name, path))
            elif self._wanted(name, path.name):
                yield name, path
        for name, path in folders:
            if self._enter(name, path, depth):
                yield from self.files(path, depth + 1)

    def read(self, name: str, path: Path) -> None:
        """Read a file into `content`, or add it to `left_out`."""
        try:
            if path.is_symlink() and not path.resolve(strict=True).is_relative_to(self._root):
                self.left_out[_LINK].append(name)
                return
            content = _read(path, MAX_BYTES)
        except RuntimeError:  # Python before 3.13
            self.left_out["a loop of links"].append(name)
            return
        except (CandidateError, OSError) as error:
            reason = "not a regular file" if isinstance(error, CandidateError) else error.strerror or str(error)
            self.left_out[reason].append(name)
            return
        if len(content) > MAX_BYTES or self._total + len(content) > MAX_TOTAL or len(self.content) == MAX_FILES:
            self.left_out[_LARGE].append(name)
        else:
            self.content[name] = content
            self._total += len(content)

    def _wanted(self, name: str, file_name: str) -> bool:
        if not may_be_carried(file_name) or (name == BACKEND and is_megatron(self.directory)):
            return False
        if is_code(file_name) and not self.code:
            self.left_out["code, which is copied with carry_code only"].append(name)
            return False
        return True

    def _enter(self, name: str, path: Path, depth: int) -> bool:
        if path.name.startswith(".") or path.name in NO_FOLDER:
            return False
        if path.is_symlink():
            self.left_out[_LINK].append(name)
        elif depth == MAX_DEPTH or self._num_entries > _MAX_ENTRIES:
            self.left_out["more folders or files than small files have"].append(name)
        elif not self._holds_weights(path):
            return True
        elif name in self._modules:
            self.left_out["its weights are not averaged; loaders of modules.json will not find it"].append(name)
        return False

    def _holds_weights(self, folder: Path) -> bool:
        for _, folders, files in os.walk(folder):
            self._num_entries += len(folders) + len(files)
            if self._num_entries > _MAX_ENTRIES:
                return False  # `_enter` skips it for the number of entries
            if any(_WEIGHTS.fullmatch(name) for name in files):
                return True
        return False


def may_be_carried(name: str) -> bool:
    """Return whether a file is neither hidden, nor weights, nor the state of a training, by its name."""
    if name.startswith(".") or name in _DEEPSPEED_FILES or _WEIGHTS.fullmatch(name):
        return False
    return not any(fnmatch(name, pattern) for pattern in _STATE)


def is_code(name: str) -> bool:
    """Return whether a file has the name of code, which loaders may run."""
    return _CODE.fullmatch(name) is not None


def root_of_links(directory: Path) -> Path:
    """Return the folder that links may point into; for a snapshot in the hub's cache, that of the repository."""
    in_cache = directory.parent.name == "snapshots" and directory.parent.parent.name.startswith(
        ("models--", "datasets--")
    )
    return directory.parent.parent if in_cache else directory


def _modules(path: Path) -> set[str]:
    """Return the folders that the modules.json of sentence-transformers names."""
    try:
        content = _read(path, 1 << 20)
        return {str(module["path"]).rstrip("/") for module in parse_json(content)}
    except (CandidateError, OSError, ValueError, TypeError, KeyError):
        return set()


def _read(path: Path, limit: int) -> bytes:
    """Return the content of a regular file, at most `limit` + 1 bytes."""
    with os.fdopen(open_regular(path), "rb") as file:
        return file.read(limit + 1)


def with_dtype(config: bytes, dtype: torch.dtype) -> bytes:
    """Return a config.json with each dtype that it has replaced by `dtype`: loaders would convert the weights."""
    try:
        settings = parse_json(config)
    except ValueError:
        return config
    if not isinstance(settings, dict):
        return config
    changed = _replaced(settings, str(dtype).removeprefix("torch."))
    return (json.dumps(changed, indent=2) + "\n").encode() if changed != settings else config


def _replaced(settings: dict[str, Any], dtype: str) -> dict[str, Any]:
    """Return settings with another dtype, also in those of the parts of a model (`text_config`)."""
    result = {key: dtype if key in ("dtype", "torch_dtype") else value for key, value in settings.items()}
    for key, value in settings.items():
        if isinstance(value, dict) and key.endswith("_config") and key != "quantization_config":
            result[key] = _replaced(value, dtype)
    return result
