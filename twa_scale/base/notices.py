"""One line about something that was done although a user may not have meant it."""

import sys
import warnings


class TwaWarning(UserWarning):
    """What was done is right under its rule, but a user may have meant something else; the message says both."""


def notice(text: str) -> None:
    """Warn with `text` at the caller's line outside of the package. Python shows it once a line of the caller.

    Call it on one rank, after the last collective: a filter may turn warnings into errors.
    """
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] == "twa_scale":
        level, frame = level + 1, frame.f_back
    warnings.warn(text, TwaWarning, stacklevel=level)


def unsaid(text: str) -> None:
    """Say nothing, where `notice` is called on another rank."""
