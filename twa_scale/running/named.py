"""The averages that have names, such as "ema", "ema:0.999", "mean" and "lawa:8"."""

import re
from typing import Any

import torch

from twa_scale.average.coefficients import Which, averaging_coefficients
from twa_scale.config import parse_center
from twa_scale.errors import ConfigError, TwaError
from twa_scale.output.model_card import SNAPSHOT_LABEL
from twa_scale.output.provenance import provenance
from twa_scale.running.ema import Ema
from twa_scale.running.settings import BEMA
from twa_scale.running.window import Window

NOW = ("last", "trained")
"""Names of the current weights of the training."""
_FIXED = ("mean", "minus-sqrt")
"""The averages of snapshots in `names`. "linear" is left out, because it equals "mean" for evenly spaced snapshots."""
_LAWA = re.compile(r"lawa:(\d+)")


def names(ema: Ema | None, window: Window | None) -> list[str]:
    """Return the names of the averages that can be shown now."""
    result = [NOW[0]]
    if ema and ema.updates:
        plain = [name for name in ema.names if name != BEMA]
        result += ["ema"] if len(plain) == 1 else plain
        result += [BEMA] if BEMA in ema.names else []
    return result + (list(_FIXED) if window and window.count else [])


def mixture(which: Which, ema: Ema | None, window: Window | None) -> torch.Tensor | None:
    """Return the factors of the snapshots, followed by those of the exponential averages, float64; None for `NOW`.

    Raises:
        ConfigError: the name is unknown, or the average is not kept; the coefficients are not n numbers.
        TwaError: the average has no update, or needs more snapshots than have been taken.
    """
    text = re.sub(r"\s*:\s*", ":", which.strip().lower()) if isinstance(which, str) else None
    if text in NOW:
        return None
    n, count = window.count if window else 0, len(ema.names) if ema else 0
    factors = torch.zeros(n + count, dtype=torch.float64)
    if text is not None and text.partition(":")[0] in ("ema", BEMA):
        factors[n + _ema(text, ema)] = 1
        return factors
    over = which if text is None else _checked(text.removeprefix("window:"), window)
    if window is None:
        raise ConfigError(f"weights: {which!r} is an average of snapshots; create RunningAverages with window={{..}}.")
    factors[:n] = _over_window(over, n, window.settings.keep)
    return factors


def origin(which: Which, step: int, ema: Ema | None, window: Window | None) -> dict[str, Any]:
    """Return the provenance of an average at a step, with its settings; see `mixture`."""
    factors, n = mixture(which, ema, window), window.count if window else 0
    if factors is None:
        return provenance("the trained weights", [], step=step)
    if bool(factors[n:].any()):
        assert ema is not None
        index = int(factors[n:].argmax())
        kind = "a bias-corrected exponential average" if ema.names[index] == BEMA else "an exponential average"
        settings = {"updates": ema.updates, **ema.settings.settings_of(index)}
        return provenance(kind, [], asked=which, step=step, ema=settings)
    assert window is not None
    named = {"asked": which} if isinstance(which, str) else {}
    labels = [f"{SNAPSHOT_LABEL}{taken}" for taken in window.steps]
    settings = window.settings.model_dump(mode="json")
    weights = factors[:n].tolist()
    return provenance("an average of snapshots", labels, **named, step=step, weights=weights, window=settings)


def _ema(text: str, ema: Ema | None) -> int:
    if ema is None:
        example = "{'bema': True}" if text == BEMA else "[0.999]"
        raise ConfigError(f"weights: {text!r}; create RunningAverages with ema={example}, for example.")
    kept = f"this object keeps {', '.join(ema.names)}; window:{text} is the average of the snapshots"
    names = list(ema.names)
    plain = [name for name in names if name != BEMA]
    if text == "ema" and len(plain) > 1:
        raise ConfigError(f"weights: 'ema' is one of several; {kept}.")
    text = plain[0] if text == "ema" and plain else text
    match = next((name for name in names if _is_same_decay(name, text)), None)
    if match is None:
        raise ConfigError(f"weights: {text!r} is not kept; {kept}.")
    if not ema.updates:
        start = ema.settings.start_step
        raise TwaError(f"weights: {text!r} has had no update yet; updates begin at step {max(start, 1)} or later.")
    return names.index(match)


def _is_same_decay(name: str, text: str) -> bool:
    if name == text:
        return True
    kind, _, number = name.rpartition(":")
    given_kind, _, value = text.rpartition(":")
    try:
        return kind == given_kind and float(value) == float(number)
    except ValueError:
        return False


def _checked(name: str, window: Window | None) -> str:
    """Return the name of an average of snapshots, after a check."""
    if lawa := _LAWA.fullmatch(name):
        keep = window.settings.keep if window else int(lawa[1])
        if not 1 <= int(lawa[1]) <= keep:
            raise ConfigError(f"weights: {name!r}; the window keeps {keep} snapshots: give 1 to {keep}.")
        return name
    try:
        parse_center(name)
    except ValueError:
        raise ConfigError(
            f"weights: {name!r} is not an average; give last, ema, ema:DECAY, mean, linear, minus-sqrt, lawa:K, the "
            "index of a snapshot, one coefficient for each, or window:NAME with a name that `center` takes."
        ) from None
    return name


def _over_window(which: Which, n: int, keep: int) -> torch.Tensor:
    """Return the coefficients of n snapshots, (n,), float64, in a window that will hold `keep`.

    Raises:
        ConfigError: `which` does not fit a window of `keep` snapshots.
        TwaError: there are not enough snapshots yet.
    """
    try:
        if n:
            return _over_snapshots(which, n)
    except ConfigError:
        if n == keep:
            raise
    _over_snapshots(which, keep)
    raise TwaError(f"weights: {which!r} is an average of more snapshots than have been taken yet: {n} of {keep}.")


def _over_snapshots(which: Which, n: int) -> torch.Tensor:
    """Return the coefficients of n snapshots, (n,), float64."""
    if isinstance(which, str) and (lawa := _LAWA.fullmatch(which)):
        which = f"lawa:{min(int(lawa[1]), n)}"
    return averaging_coefficients(which, torch.zeros(n, dtype=torch.float64), 1)[:, 0]
