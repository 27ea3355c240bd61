"""Differences between candidates in configurations and vocabularies are reported, except for irrelevant entries."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from twa_scale.base.notices import TwaWarning
from twa_scale.candidates import open_candidates
from twa_scale.candidates.compatibility import differences
from twa_scale.merge import average_fixed

CONFIG = {"rope_theta": 1e4, "rope_scaling": {"type": "yarn", "factor": 2.0}, "dtype": "float32"}
TOKENS: dict[str, Any] = {"model": {"vocab": {"a": 0, "b": 1}}, "added_tokens": [], "truncation": None}


def candidate(path: Path, **files: Any) -> Path:
    path.mkdir()
    save_file({"w": torch.ones(2)}, path / "model.safetensors")
    for name, content in files.items():
        text = content if isinstance(content, str) else json.dumps(content)
        (path / name.replace("__", ".")).write_text(text)
    return path


def said(*directories: Path) -> list[str]:
    return list(differences(open_candidates(list(directories))))


@pytest.mark.parametrize(
    ("name", "first", "last", "reason"),
    [
        ("config__json", CONFIG, CONFIG | {"rope_theta": 1e6}, "'rope_theta' (10000.0, 1000000.0)"),
        ("config__json", CONFIG, {"dtype": "float32", "rope_theta": 1e4}, "'rope_scaling'"),
        ("config__json", {"text_config": CONFIG}, {"text_config": CONFIG | {"rope_theta": 1e6}}, "'text_config' "),
        ("adapter_config__json", {"lora_alpha": 8}, {"lora_alpha": 16}, "'lora_alpha' (8, 16)"),
        ("tokenizer__json", TOKENS, TOKENS | {"model": {"vocab": {"a": 1, "b": 0}}}, "its tokens"),
        ("tokenizer__json", TOKENS, TOKENS | {"added_tokens": [{"id": 2}]}, "its tokens"),
        ("tokenizer__json", TOKENS, TOKENS | {"model": {"vocab": {"a": 0, "b": 1, "dtype": 2}}}, "its tokens"),
        ("vocab__txt", "a\nb\n", "b\na\n", "its tokens"),
    ],
)
def test_differences_are_reported(tmp_path: Path, name: str, first: Any, last: Any, reason: str) -> None:
    paths = [candidate(tmp_path / f"{i}", **{name: content}) for i, content in enumerate([first, first, last])]
    (line,) = said(*paths)
    file = name.replace("__", ".")
    assert line.startswith(f"{paths[0] / file} (and 1 more): differs from {paths[2] / file} in {reason}"), line
    with pytest.warns(TwaWarning, match="no useful average"):
        average_fixed(list(map(str, paths)), tmp_path / "out")


@pytest.mark.parametrize(
    ("name", "first", "last"),
    [
        ("config__json", CONFIG, CONFIG | {"dtype": "bfloat16", "transformers_version": "5", "use_cache": False}),
        ("config__json", {"text_config": CONFIG}, {"text_config": CONFIG | {"dtype": "bfloat16", "use_cache": False}}),
        ("config__json", {"parts": [CONFIG]}, {"parts": [CONFIG | {"_name_or_path": "x"}]}),
        ("config__json", CONFIG, "{"),
        ("config__json", "[1]", CONFIG),
        ("adapter_config__json", {"r": 8, "inference_mode": True}, {"r": 8, "inference_mode": False}),
        ("tokenizer__json", TOKENS, TOKENS | {"truncation": {"max_length": 8}}),
        ("vocab__txt", "a\nb\n", "a\nb\n"),
        ("trainer_state__json", {"step": 1}, {"step": 2}),
    ],
)
def test_irrelevant_differences_are_not_reported(tmp_path: Path, name: str, first: Any, last: Any) -> None:
    paths = [candidate(tmp_path / f"{i}", **{name: content}) for i, content in enumerate([first, last])]
    assert not said(*paths)


def test_candidates_without_the_file_are_not_compared(tmp_path: Path) -> None:
    paths = [candidate(tmp_path / "0"), candidate(tmp_path / "1", config__json=CONFIG)]
    assert not said(*paths) and not said(*reversed(paths))
    assert not said(paths[0] / "model.safetensors", tmp_path / "1")
