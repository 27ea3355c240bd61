"""Other weights than the trained ones, shown in a `with` block and taken back at its end."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from hashlib import sha256

import torch

from twa_scale.average.coefficients import Which
from twa_scale.engines import Engine
from twa_scale.errors import RankError, TwaError
from twa_scale.ranks import BlockExits, Pods, is_collective_failure, publish_failure, rank_errors, require_same_settings

_BACKWARD = (
    "backward() inside weights(): the gradient is not that of the trained weights. Leave weights() before backward(), "
    "and call zero_grad() to forget what this pass has left."
)
_LOST = (
    "weights() was left by an error before all ranks had left it, so that they could not restore the trained weights "
    "together, and this rank still has the others. End the run on all ranks, and continue from its last state."
)


class Shown:
    """What the model shows in place of the trained weights.

    Args:
        engine: holds the model.
        pods: all ranks.
        write: writes the weights that are shown now. Collective over the shard group.
        spoil: makes the gradients since the last step unusable.
    """

    def __init__(
        self, engine: Engine, pods: Pods, write: Callable[[], None], spoil: Callable[[TwaError], None]
    ) -> None:
        self._engine = engine
        self._pods = pods
        self._write = write
        self._spoil = spoil
        self._stack: list[torch.Tensor | None] = []
        self._held: list[dict[str, torch.Tensor]] = []
        self._exits = BlockExits(pods)
        self.lost = ""
        """Why the average can no longer be used; empty as long as it can."""

    def __bool__(self) -> bool:
        return bool(self._stack)

    @property
    def now(self) -> torch.Tensor | None:
        """The averaging coefficients that are shown, (n, G); None for those that are trained."""
        return self._stack[-1] if self._stack else None

    def own_buffers(self) -> dict[str, torch.Tensor]:
        """Return the buffers of the trained weights: those of the model, or copies of what they were before."""
        return self._held[0] if self._held else self._engine.buffers()

    @contextmanager
    def showing(self, which: Which, choose: Callable[[], torch.Tensor | None]) -> Iterator[None]:
        """Show the coefficients `choose()` in a `with` block, then restore weights and buffers. Collective.

        An error that leaves the block on every rank, or on some while the others are at its end, is raised on every
        rank, and weights are restored. Where others do not come to the end of the block they may be in a collective of
        it: then nothing can be restored, and the error is raised on this rank alone.

        Args:
            which: what messages call them.
            choose: raises what all ranks are told.

        Raises:
            ConfigError: ranks that show different weights.
            RankError: a rank has left the block by an error, and has not come to restore the weights.
        """
        with self._pods.agree():
            chosen = choose()
        require_same_settings(self._pods, {"weights(which)": _named(which, chosen)})
        self._held.append({name: buffer.clone() for name, buffer in self._engine.buffers().items()})
        self._stack.append(chosen)
        failure: BaseException | None = None
        reached: list[bool] = []
        handles = []
        try:
            self._write()
            handles = self._engine.on_gradient(lambda: reached.append(True))
            yield
        except BaseException as error:
            failure = error
        if reached:  # not before: what raises within a backward pass leaves libraries in the middle of theirs
            self._spoil(TwaError(_BACKWARD))
            failure = failure or TwaError(_BACKWARD)
        for handle in handles:
            handle.remove()
        self._stack.pop()
        try:
            failure = self._together(failure)
            self._write()
        except BaseException:
            self.lost = _LOST
            raise
        finally:
            before = self._held.pop()
            for name, buffer in self._engine.buffers().items():
                buffer.copy_(before[name])
        if failure is not None:
            raise failure

    def _together(self, failure: BaseException | None) -> BaseException | None:
        """Return the error that leaves the block on this rank, or on another one, when all ranks have left it.

        Raises:
            BaseException: `failure`, when they have not.
        """
        if self._pods.size == 1:
            return failure
        if self.lost:
            raise failure or TwaError(self.lost)
        if failure is not None and (not isinstance(failure, Exception) or is_collective_failure(failure)):
            self._exits.give_up()
            with publish_failure(), rank_errors():
                raise failure
        self._exits.record()
        if failure is None:
            self._exits.require_all()
        elif not self._exits.all_left():
            with publish_failure():
                raise failure
        try:
            with self._pods.agree():
                if failure is not None:
                    raise failure
        except RankError:
            raise
        except Exception as error:
            return failure or error
        return None


def _named(which: Which, chosen: torch.Tensor | None) -> object:
    if chosen is None or isinstance(which, str | int):
        return which
    return f"coefficients with the SHA-256 {sha256(chosen.cpu().numpy().tobytes()).hexdigest()[:16]}"
