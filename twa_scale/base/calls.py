"""The frames of the running calls, for values that trainers do not pass to their callbacks."""

import sys
from collections.abc import Iterator
from types import FrameType


def running_calls() -> Iterator[FrameType]:
    """Yield the frames of the calls that are running, innermost first."""
    frame = sys._getframe().f_back
    while frame is not None:
        yield frame
        frame = frame.f_back
