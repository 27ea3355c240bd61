"""Records whether averages can be used. After an error during a write, they cannot."""

from collections.abc import Iterator
from contextlib import contextmanager

from twa_scale.base.notices import notice
from twa_scale.errors import TwaError

_INTERRUPTED = "an error has interrupted an update in step(), so that only a part of the averages was updated."
_OVERWRITTEN = "a state that does not fit was read into them by torch.distributed.checkpoint."
_FIX = "Load a state, or create RunningAverages again."


class Validity:
    """Records the reason why the averages of this rank cannot be used, if there is one."""

    def __init__(self) -> None:
        self.why_not = ""
        """The reason why the averages cannot be used, or an empty text."""

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Wrap an update of the averages. If it raises an error, the averages can no longer be used."""
        self.why_not = _INTERRUPTED
        yield
        self.why_not = ""

    def overwritten(self) -> None:
        """Record that a refused state has been read into the averages."""
        self.why_not = _OVERWRITTEN

    def restored(self) -> None:
        """Record that a state was loaded."""
        self.why_not = ""

    def require(self) -> None:
        """Raise an error if the averages cannot be used.

        Raises:
            TwaError: the reason.
        """
        if self.why_not:
            raise TwaError(f"the averages cannot be used: {self.why_not} {_FIX}")

    def report(self) -> None:
        """Report that `state_dict` was called while the averages cannot be used."""
        if self.why_not:
            notice(f"state_dict(): the averages cannot be used: {self.why_not} {_FIX}")
