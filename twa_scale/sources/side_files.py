"""The files of a Hugging Face directory that are not weights, to be carried over to a new set of weights."""

import json
from fnmatch import fnmatch
from pathlib import Path

import torch

from twa_scale.inputs import MAX_JSON, parse_json, read_bounded

_CARRIED = (
    "config.json",
    "generation_config.json",
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "preprocessor_config.json",
    "*processor_config.json",
    "*.model",
    "*.jinja",
    "*.py",
)
_LEFT = ("zero_to_fp32.py", "zero_to_torch.py")  # DeepSpeed puts them beside its checkpoints
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")


def side_files(directory: Path | None, dtype: torch.dtype | None = None) -> dict[str, bytes | Path]:
    """Return configuration, tokenizer and code files by name; never weights, optimizer or trainer state.

    Args:
        directory: that of a candidate; None has no files.
        dtype: type that the weights are converted to: `config.json` must say it, or loading would convert
            them back.
    """
    if directory is None:
        return {}
    files: dict[str, bytes | Path] = {
        path.name: path
        for path in sorted(directory.iterdir())
        if path.is_file()
        and path.suffix not in _WEIGHTS
        and path.name not in _LEFT
        and any(fnmatch(path.name, p) for p in _CARRIED)
    }
    if dtype is not None and "config.json" in files:
        files["config.json"] = _with_dtype(read_bounded(directory / "config.json", MAX_JSON), dtype)
    return files


def _with_dtype(config: bytes, dtype: torch.dtype) -> bytes:
    try:
        settings = parse_json(config)
    except ValueError:
        return config
    if not isinstance(settings, dict):
        return config
    changed = {key: str(dtype).removeprefix("torch.") for key in ("dtype", "torch_dtype") if key in settings}
    return (json.dumps(settings | changed, indent=2) + "\n").encode() if changed else config
