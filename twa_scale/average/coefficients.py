"""Averaging coefficients from a name, an index, or numbers."""

from collections.abc import Sequence
from hashlib import sha256

import torch

from twa_scale.config import center_weights, parse_center
from twa_scale.errors import ConfigError

Which = str | int | Sequence[float] | torch.Tensor


def averaging_coefficients(which: Which, center_weights: torch.Tensor, num_groups: int) -> torch.Tensor:
    """Return the averaging coefficients a (n, G) of `which`, with the dtype and device of `center_weights`.

    Args:
        which: "center", a value of the setting `center` ("mean", "ema:0.9", "last", 0, ..), or coefficients of shape
            (n,) or (n, G) with any sum.
        center_weights: the weights b of the center, (n,).
        num_groups: the number of groups, G.

    Raises:
        ConfigError: the name is unknown, the index is out of range, or the coefficients are not finite or have
            another shape.
    """
    n = len(center_weights)
    a = center_weights if isinstance(which, str) and which == "center" else _named(which, n).to(center_weights)
    if a.shape == (n,):
        a = a[:, None].expand(-1, num_groups).contiguous()
    if a.shape != (n, num_groups):
        raise ConfigError(
            f"weights: coefficients of shape {tuple(a.shape)}; give ({n},) or ({n}, {num_groups}): candidates x groups."
        )
    if not bool(torch.isfinite(a.abs().sum(0).to(torch.float32)).all()):
        raise ConfigError("weights: coefficients must be finite numbers whose sum fits in float32.")
    return a


def _named(which: Which, n: int) -> torch.Tensor:
    try:
        if isinstance(which, str | int) and not isinstance(which, bool):
            which = parse_center(which)
            if not isinstance(which, list):
                which = center_weights(which, n, "weights")
        if not isinstance(which, torch.Tensor):  # float64, because the default dtype would round
            return torch.as_tensor(which, dtype=torch.float64, device="cpu")
        if which.is_meta or which.is_complex():
            raise TypeError
        return which.detach().to(torch.float64)
    except (TypeError, ValueError, RuntimeError):
        raise ConfigError(
            f"weights: {which!r} are not weights of {n} candidates; use trained, center, a name or an index that the "
            "setting `center` takes, or coefficients."
        ) from None


def name_for_ranks(which: Which, chosen: torch.Tensor | None) -> object:
    """Return a short value that ranks can compare, for `which` and its coefficients; None for the trained ones."""
    if chosen is None or isinstance(which, str | int):
        return which
    return f"coefficients with the SHA-256 {sha256(chosen.cpu().numpy().tobytes()).hexdigest()[:16]}"
