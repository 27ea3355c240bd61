"""Tensors in files that a kill leaves whole, or does not leave at all."""

from pathlib import Path
from typing import Any

import torch

from twa_scale.output.publish import replacing


def save(state: dict[str, Any], path: Path) -> None:
    """Write a state."""
    with replacing(path) as temporary:
        torch.save(state, temporary)


def load(path: Path) -> dict[str, Any]:
    """Return a state that `save` has written."""
    state: dict[str, Any] = torch.load(path, weights_only=True)
    return state
