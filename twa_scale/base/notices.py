"""Warnings of one line about results that a user may not have intended."""

import sys
import warnings


class TwaWarning(UserWarning):
    """A warning about a valid result that the user may not have intended. The message names the rule and the choice."""


_LIBRARIES = {
    *("twa_scale", "transformers", "trl", "accelerate", "deepspeed", "torch", "contextlib"),
    *("lightning", "lightning_fabric", "pytorch_lightning"),
}
"""Packages whose lines are not the user's: trainers call callbacks, and `contextlib` enters `with` blocks."""


def notice(text: str) -> None:
    """Issue a `TwaWarning` with `text`, attributed to the user's line: the caller outside of `_LIBRARIES`.

    Python shows it once for each line of the caller. Call it on one rank, after the last collective, because a filter
    may turn warnings into errors.
    """
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in _LIBRARIES:
        level, frame = level + 1, frame.f_back
    warnings.warn(text, TwaWarning, stacklevel=level)


def ignore_notice(text: str) -> None:
    """Do nothing. Used on ranks where another rank calls `notice`."""
