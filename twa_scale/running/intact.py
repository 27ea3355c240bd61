"""Records whether averages can be used: after an error in the middle of a write they cannot."""

from collections.abc import Iterator
from contextlib import contextmanager

from twa_scale.base.notices import notice
from twa_scale.errors import TwaError

_INTERRUPTED = "an error has interrupted an update in step(), so that only a part of the averages was updated."
_OVERWRITTEN = "a state that does not fit was read into them by torch.distributed.checkpoint."
_FIX = "Load a state, or make RunningAverages anew."


class Intact:
    """Records why the averages of this rank cannot be used, if they cannot."""

    def __init__(self) -> None:
        self.why_not = ""
        """Empty as long as they can."""

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Wrap an update of the averages: they cannot be used after an error in it."""
        self.why_not = _INTERRUPTED
        yield
        self.why_not = ""

    def overwritten(self) -> None:
        """Note that a state that was refused has been read into the averages."""
        self.why_not = _OVERWRITTEN

    def restored(self) -> None:
        """Note that a state was loaded."""
        self.why_not = ""

    def require(self) -> None:
        """Refuse averages that cannot be used.

        Raises:
            TwaError: says why.
        """
        if self.why_not:
            raise TwaError(f"the averages cannot be used: {self.why_not} {_FIX}")

    def report(self) -> None:
        """Report that a state is taken of averages that cannot be used."""
        if self.why_not:
            notice(f"state_dict(): the averages cannot be used: {self.why_not} {_FIX}")
