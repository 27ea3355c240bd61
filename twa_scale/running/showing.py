"""Shows averages in the model instead of the trained weights, of which this rank then keeps a copy."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch

from twa_scale.average.coefficients import Which
from twa_scale.average.swap import SwappedWeights
from twa_scale.base.normal_mode import in_normal_mode
from twa_scale.base.notices import notice
from twa_scale.engines import Engine
from twa_scale.errors import TwaError
from twa_scale.ranks import Pods
from twa_scale.running.ema import Ema
from twa_scale.running.named import mixture
from twa_scale.running.parameters import Parameters
from twa_scale.running.trained import TrainedCopy
from twa_scale.running.window import Window

_LOST = (
    "learn() has failed on some ranks only, so that they could not restore the trained weights together, and this rank "
    "may hold others. End the run on all ranks, and continue from its last state."
)


class Showing:
    """Shows averages, and saves and restores the trained weights. All methods are collective.

    Args:
        engine: holds the model.
        pods: all ranks.
        parameters: the averaged parameters.
        ema: exponential averages.
        window: snapshots.
        device: the device of the copy; by default, the device of the weights.
    """

    def __init__(
        self,
        engine: Engine,
        pods: Pods,
        parameters: Parameters,
        ema: Ema | None,
        window: Window | None,
        device: torch.device | None,
    ) -> None:
        self._engine = engine
        self._pods = pods
        self._parameters = parameters
        self._ema = ema
        self._window = window
        self._trained = TrainedCopy(device)
        self._shown = SwappedWeights(engine, pods, self._write, lambda _: None)
        self._versions: dict[str, object] = {}

    def __bool__(self) -> bool:
        """Whether a `with` block of `weights` is open."""
        return bool(self._shown)

    @property
    def lost(self) -> str:
        """The reason why the ranks can no longer restore the trained weights, or an empty text."""
        return self._shown.lost

    @property
    def has_copy(self) -> bool:
        """Whether there is a copy of the trained weights."""
        return self._trained.has_copy

    @property
    def nbytes(self) -> int:
        """The bytes of the copy."""
        return self._trained.nbytes

    @contextmanager
    def weights(self, which: Which, check: Callable[[], None]) -> Iterator[None]:
        """Show an average in a `with` block, as `RunningAverages.weights`. All ranks raise the errors of `check`."""
        if self.lost:
            raise TwaError(self.lost)

        def choose() -> torch.Tensor | None:
            check()
            return self._mixture(which)

        with self._shown.showing(which, choose):
            yield
            self._report_writes()

    def keep(self, buffers: Mapping[str, torch.Tensor]) -> None:
        """Copy the trained weights and these buffers, on all ranks or on none. Does nothing if there is a copy."""
        if self._trained.has_copy:
            return
        try:
            with self._pods.agree():
                self._trained.keep(self._parameters.live(), buffers)
        except BaseException:
            self._trained.forget()
            raise

    def restore(self) -> None:
        """Write the copy into the model and free it."""
        if self._trained.restore(self._parameters.live(), self._engine.buffers()):
            self._parameters.publish()

    def together(self, failure: BaseException | None) -> BaseException | None:
        """Return the error of this rank or of another one, if all ranks can restore the weights together.

        Raises:
            BaseException: `failure`, if they cannot.
        """
        try:
            return self._shown.together(failure)
        except BaseException:
            self._shown.lost = _LOST
            raise

    @in_normal_mode
    def _mixture(self, which: Which) -> torch.Tensor | None:
        self._parameters.versions()
        self._parameters.report_newly_trained()
        chosen = mixture(which, self._ema, self._window)
        if chosen is None:
            return None
        index = self._ema_of(chosen)
        if index is not None:
            assert self._ema is not None
            self._ema.require_finite(index)
        elif self._window:
            self._window.require_finite()
        return chosen

    def _ema_of(self, chosen: torch.Tensor) -> int | None:
        """Return the index of the exponential average that a mixture consists of, if it is a single one."""
        n = self._window.count if self._window else 0
        return int(chosen[n:].argmax()) if chosen[n:].any() else None

    @in_normal_mode
    def _write(self) -> None:
        """Write the weights that are to be shown. The trained weights are read from their copy."""
        chosen = self._shown.now
        if chosen is None:
            self.restore()
            return
        self.keep({})
        live, index = self._parameters.live(), self._ema_of(chosen)
        if index is None:
            assert self._window is not None
            self._window.write(chosen[: self._window.count], live)
        else:
            assert self._ema is not None
            self._ema.write(index, live)
            self._write_buffers(self._ema, index)
        self._parameters.publish()
        self._versions = self._parameters.versions()

    def _write_buffers(self, ema: Ema, index: int) -> None:
        """Write the buffers of an average, which are on the first rank."""
        if not ema.settings.use_buffers:
            return
        values = self._pods.broadcast({name: buffer.cpu() for name, buffer in ema.buffers[index].items()})
        with torch.no_grad():
            for name, buffer in self._parameters.buffers().items():
                buffer.copy_(values[name])

    def _report_writes(self) -> None:
        """Report that the weights were written while an average was shown, because the end of the block undoes it."""
        if self._shown.now is None or self._parameters.versions() == self._versions or self._pods.rank != 0:
            return
        notice(
            "weights(): the weights were written while an average was shown, and what was written is undone with it. "
            "Leave weights() before optimizer.step() or load_state_dict()."
        )
