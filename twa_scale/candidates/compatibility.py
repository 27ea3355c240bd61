"""Compare files such as config.json. Candidates that differ in them may have no useful average."""

import os
from collections.abc import Collection, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from twa_scale.base.inputs import MAX_JSON, brief, open_regular, parse_json, read_bounded
from twa_scale.candidates.adapters import adapter_config
from twa_scale.candidates.candidate import Candidate
from twa_scale.errors import CandidateError

_CONFIGURATIONS = ("config.json", "adapter_config.json", "open_clip_config.json")
_VOCABULARIES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tekken.json",
)
# Settings that do not affect the meaning of the weights: types, versions, paths and options of execution.
_IGNORED_KEYS = {
    "_name_or_path",
    "_commit_hash",
    "architectures",
    "auto_map",
    "dtype",
    "inference_mode",
    "torch_dtype",
    "transformers_version",
    "use_cache",
    "revision",
    "peft_version",
    "_diffusers_version",
}
# For LoRA adapters also the scalings and ranks, which an average takes into account, and settings of training.
_IGNORED_LORA_KEYS = {"r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "lora_dropout"}
_SETS = ("target_modules", "modules_to_save", "exclude_modules", "target_parameters")  # saved in any order
_PIECE = 1 << 20


def differences(candidates: Sequence[Candidate]) -> Iterator[str]:
    """Yield a line for each configuration and each vocabulary in which a candidate differs from the last one."""
    last = candidates[-1].directory
    if last is None:
        return
    config = adapter_config(candidates[-1])
    ignored = _IGNORED_KEYS | (_IGNORED_LORA_KEYS if config and config.kind == "LORA" else set())
    for name in (*_CONFIGURATIONS, *_VOCABULARIES):
        difference = partial(_difference, ignored=ignored) if name in _CONFIGURATIONS else _other_vocabulary
        if not (last / name).is_file():
            continue
        result = [(path, reason) for path in _others(candidates, name) if (reason := difference(path, last / name))]
        if result:
            path, reason = result[0]
            more = f" (and {len(result) - 1} more)" if len(result) > 1 else ""
            yield (
                f"{path}{more}: differs from {last / name}{reason}, which is copied to the output. Such candidates may "
                "have no useful average."
            )


def _others(candidates: Sequence[Candidate], name: str) -> list[Path]:
    paths = [c.directory / name for c in candidates[:-1] if c.directory and c.directory != candidates[-1].directory]
    return [path for path in dict.fromkeys(paths) if path.is_file()]


def _difference(path: Path, other: Path, ignored: Collection[str]) -> str | None:
    """Return a text about the first setting in which two configurations differ, or None."""
    first, second = _settings(path), _settings(other)
    if first is None or second is None:
        return None
    first, second = _meaningful(first, ignored), _meaningful(second, ignored)
    for key in sorted(first.keys() | second.keys()):
        if first.get(key) != second.get(key):
            return f" in {key!r} ({brief(first.get(key))}, {brief(second.get(key))})"
    return None


def _settings(path: Path) -> dict[str, Any] | None:
    try:
        content = parse_json(read_bounded(path, MAX_JSON))
    except (CandidateError, ValueError):  # unreadable files are reported when they are copied
        return None
    return content if isinstance(content, dict) else None


def _meaningful(value: Any, ignored: Collection[str]) -> Any:
    """Return settings without `ignored` ones, also in the parts of a model (`text_config`)."""
    if isinstance(value, dict):
        relevant = {key: one for key, one in value.items() if key not in ignored}
        return {
            key: sorted(map(str, one)) if key in _SETS and isinstance(one, list) else _meaningful(one, ignored)
            for key, one in relevant.items()
        }
    return [_meaningful(one, ignored) for one in value] if isinstance(value, list) else value


def _other_vocabulary(path: Path, other: Path) -> str | None:
    """Return a text if two files have different tokens. Settings of padding and truncation are not compared."""
    try:
        if path.samefile(other) or _same_bytes(path, other):
            return None
    except (CandidateError, OSError):
        return None
    first, second = (_settings(p) if p.name == "tokenizer.json" else None for p in (path, other))
    if first and second and all(first.get(key) == second.get(key) for key in ("model", "added_tokens")):
        return None
    return " in its tokens"


def _same_bytes(path: Path, other: Path) -> bool:
    with os.fdopen(open_regular(path), "rb") as first, os.fdopen(open_regular(other), "rb") as second:
        if os.fstat(first.fileno()).st_size != os.fstat(second.fileno()).st_size:
            return False
        while piece := first.read(_PIECE):
            if piece != second.read(_PIECE):
                return False
    return True
