"""The trainable average of the snapshots in the model, until the weights of the model are restored."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch

from twa_scale.average.average import TrainableAverage
from twa_scale.base.normal_mode import in_normal_mode
from twa_scale.engines import Engine
from twa_scale.errors import TwaError
from twa_scale.running.showing import Showing


class Learned:
    """Puts a trainable average into the model, and restores the trained weights, buffers and counters after it.

    All methods are collective.

    Args:
        engine: holds the model.
        showing: copies and restores the trained weights.
        restored: called after the weights were restored.
    """

    def __init__(self, engine: Engine, showing: Showing, restored: Callable[[], None]) -> None:
        self._engine = engine
        self._showing = showing
        self._restored = restored
        self._average: TrainableAverage | None = None
        self._restore_counters: Callable[[], None] = lambda: None

    def __bool__(self) -> bool:
        """Whether the average is in the model."""
        return self._average is not None

    @in_normal_mode
    def start(self, make: Callable[[], TrainableAverage], buffers: Mapping[str, torch.Tensor]) -> TrainableAverage:
        """Return the average of `make()`, which writes its weights. After an error, all ranks restore theirs.

        Args:
            make: returns the average. Its errors are raised on every rank.
            buffers: the buffers of the model, which are restored with the weights.
        """
        self._showing.keep(buffers)
        self._restore_counters = self._engine.counters()
        failure: BaseException | None = None
        try:
            self._average = make()
        except BaseException as error:
            failure = error
        failure = self._showing.together(failure)
        if failure is not None:
            self.restore()
            raise failure
        assert self._average is not None
        return self._average

    @contextmanager
    def restoring(self) -> Iterator[None]:
        """Call `restore` at the end of a `with` block, also after an error.

        Raises:
            RankError: another rank left the block with an error. The weights are not restored.
        """
        failure: BaseException | None = None
        try:
            yield
        except BaseException as error:
            failure = error
        failure = self._showing.together(failure)
        self.restore()
        if failure is not None:
            raise failure

    @in_normal_mode
    def restore(self) -> None:
        """Close the average, and restore the trained weights if there is a copy.

        Raises:
            TwaError: the ranks can no longer restore the weights together.
        """
        if self._showing or not self._showing.has_copy:
            return
        if self._showing.lost:
            raise TwaError(self._showing.lost)
        if self._average is not None and not self._average.closed:
            self._average.close()
        self._showing.restore()
        self._average = None
        self._restore_counters()
        self._restored()
