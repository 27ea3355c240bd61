"""Put other weights than the trained ones into the model for a `with` block."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from twa_scale.average.coefficients import Which, name_for_ranks
from twa_scale.engines import Engine
from twa_scale.errors import RankError, TwaError
from twa_scale.ranks import BlockExits, Pods, is_collective_failure, publish_failure, rank_errors, require_same_settings

_BACKWARD = (
    "backward() inside weights(): the gradient is not that of the trained weights. Leave weights() before backward(), "
    "and call zero_grad() to clear the gradients of this pass."
)
_LOST = (
    "an error ended weights() before all ranks had left it, so that they could not restore the trained weights "
    "together, and this rank still has other weights. End the run on all ranks, and continue from its last state."
)


class SwappedWeights:
    """A stack of weights that replace the trained ones in nested `with` blocks.

    Args:
        engine: holds the model.
        pods: all ranks.
        write: writes the current weights, those of `now`. Collective over the shard group.
        set_fault: makes the next step raise this error.
    """

    def __init__(
        self, engine: Engine, pods: Pods, write: Callable[[], None], set_fault: Callable[[TwaError], None]
    ) -> None:
        self._engine = engine
        self._pods = pods
        self._write = write
        self._set_fault = set_fault
        self._stack: list[torch.Tensor | None] = []
        self._saved_buffers: list[dict[str, torch.Tensor]] = []
        self._exits = BlockExits(pods)
        self.lost = ""
        """The reason why the average can no longer be used, or the empty string."""

    def __bool__(self) -> bool:
        return bool(self._stack)

    @property
    def now(self) -> torch.Tensor | None:
        """The averaging coefficients of the current weights, (n, G); None for the trained ones."""
        return self._stack[-1] if self._stack else None

    def own_buffers(self) -> dict[str, torch.Tensor]:
        """Return the buffers of the trained weights; inside a block, the copies from before it."""
        return self._saved_buffers[0] if self._saved_buffers else self._engine.buffers()

    @contextmanager
    def showing(self, which: Which, choose: Callable[[], torch.Tensor | None]) -> Iterator[None]:
        """Write the weights of `choose()` for a `with` block, then restore weights and buffers. Collective.

        If every rank leaves the block, some with an error, the weights are restored and the error is raised on every
        rank. If a rank does not reach the end of the block, it may wait in a collective: the weights are not restored,
        and the error is raised only on the ranks that have left.

        Args:
            which: the name of the weights for messages.
            choose: returns their coefficients (n, G), or None for the trained ones; its errors are raised on every
                rank.

        Raises:
            ConfigError: ranks choose different weights.
            RankError: a rank left the block with an error and did not restore the weights.
        """
        with self._pods.agree():
            chosen = choose()
        require_same_settings(self._pods, {"weights(which)": name_for_ranks(which, chosen)})
        self._saved_buffers.append({name: buffer.clone() for name, buffer in self._engine.buffers().items()})
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
        if reached:  # not inside the backward pass: an error there leaves other libraries in an undefined state
            self._set_fault(TwaError(_BACKWARD))
            failure = failure or TwaError(_BACKWARD)
        for handle in handles:
            handle.remove()
        self._stack.pop()
        try:
            failure = self.together(failure)
            self._write()
        except BaseException:
            self.lost = _LOST
            raise
        finally:
            before = self._saved_buffers.pop()
            for name, buffer in self._engine.buffers().items():
                if name in before:  # skip those that were registered in the block
                    buffer.copy_(before[name])
        if failure is not None:
            raise failure

    def together(self, failure: BaseException | None) -> BaseException | None:
        """Return the error that ended a block on this rank or on another one, after all ranks have left it. Collective.

        Raises:
            BaseException: `failure`, if a rank has not left the block.
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
