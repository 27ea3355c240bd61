"""Tensors in files that a kill leaves whole, or does not leave at all."""

import os
from pathlib import Path
from typing import Any

import torch


def save(state: dict[str, Any], path: Path) -> None:
    """Write a state."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".writing")
    torch.save(state, temporary)
    os.replace(temporary, path)


def load(path: Path) -> dict[str, Any]:
    """Return a state that `save` has written."""
    state: dict[str, Any] = torch.load(path, weights_only=True)
    return state
