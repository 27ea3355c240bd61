"""Compare a saved state with the settings, the model and the other ranks."""

from collections.abc import Mapping
from hashlib import sha256
from typing import Any

import torch

from twa_scale.average.state.schema import AverageState, RowsState
from twa_scale.errors import StateError
from twa_scale.ranks import Ranks, first_difference

# Saved coefficients and moments depend on these settings. Others, such as the store, may change.
_FIXED_SETTINGS = (
    "basis",
    "groups",
    "center",
    "units",
    "num_components",
    "include",
    "exclude",
    "optimizer",
    "max_grad_norm",
    "max_weight_grad_norm",
)


def require_same_settings(current: Mapping[str, Any], saved: Mapping[str, Any]) -> None:
    """Check that the settings on which the coefficients depend are the same.

    Raises:
        StateError: names the first setting that differs.
    """
    for key in _FIXED_SETTINGS:
        if saved[key] != current[key]:
            raise StateError(
                f"{key}: the state was trained with {saved[key]!r}, this run has {current[key]!r}, with which its "
                "coefficients have another meaning. Use the saved setting, or start a new run."
            )


def require_same_shapes(live: Mapping[str, torch.Tensor], saved: Mapping[str, torch.Tensor]) -> None:
    """Check that the model has the saved buffers with the same shapes.

    Raises:
        StateError: names the first of them.
    """
    for name, value in saved.items():
        if name not in live or live[name].shape != value.shape:
            shape = tuple(live[name].shape) if name in live else "none"
            raise StateError(
                f"state: buffers: {name!r} has shape {tuple(value.shape)} in the state, and {shape} in the model. "
                "Give the state of this model, or start a new run."
            )


def require_same_state(group: Ranks, state: AverageState) -> None:
    """Check that the states of all ranks are equal. Collective.

    Raises:
        StateError: on every rank.
    """
    parts = {"x": _plain(state.x), "optimizer": _plain(state.optimizer), "rows": _digest(state.rows)}
    other = first_difference(group, parts)
    with group.agree():
        if other:
            raise StateError(
                f"state: {other.key}: it differs between {other.location} and {other.first_location}; give all ranks "
                "the same state."
            )


def _digest(rows: RowsState | None) -> str:
    """Return the SHA-256 of the corrections of rows and their moments, which may be large."""
    hasher = sha256(
        repr(rows and (rows.stored, rows.settings, rows.names, list(rows.values), list(rows.moments))).encode()
    )
    for tensors in (rows.values, *rows.moments.values()) if rows else ():
        for value in tensors.values() if isinstance(tensors, Mapping) else (tensors,):
            hasher.update(
                value.detach().cpu().numpy().tobytes() if isinstance(value, torch.Tensor) else repr(value).encode()
            )
    return hasher.hexdigest()


def _plain(value: Any) -> Any:
    """Return `value` with tensors as lists, so that its text has all their numbers."""
    if isinstance(value, torch.Tensor):
        return value.dtype, value.tolist()
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value
