"""The part of an average that saves its state, and continues from one."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from twa_scale.average import batchnorm
from twa_scale.average.closing import while_open
from twa_scale.average.observed import Observed
from twa_scale.average.save_in_memory import save_in_memory
from twa_scale.average.state import KeptState, RowsState, require_same_state, require_stored_rows
from twa_scale.average.step import CoefficientStep
from twa_scale.average.step_optimizer import AverageOptimizer
from twa_scale.base.notices import notice
from twa_scale.errors import StateError, TwaError


class AverageValues(NamedTuple):
    """An average of the candidates, in the memory of this rank."""

    x: torch.Tensor
    """The coefficients, (k, G), float64."""
    coefficients: torch.Tensor
    """The averaging coefficients a, (n, G), float64."""
    rows: torch.Tensor | None
    """The corrections of this rank's rows, (k, R), with `groups: tensor+row`."""
    buffers: dict[str, torch.Tensor]
    """BatchNorm statistics."""


class Stateful(Observed):
    """The part of a `TrainableAverage` that saves and restores it. The attributes are those of the average."""

    optimizer: AverageOptimizer
    _step: CoefficientStep

    @while_open
    def save_in_memory(self) -> Callable[[], None]:
        """Return a function that restores the current coefficients, moments, learning rate and buffers. Not collective.

        The function is collective. It holds copies of the values of this rank: kilobytes, and with `groups: tensor+row`
        the corrections and the moments of this rank's rows.
        """
        if self._swapped:
            raise TwaError("save_in_memory() inside weights(): leave it first.")
        restore, config = save_in_memory(self._engine, self._written, self.optimizer), self.config

        def back() -> None:
            restore()
            self._form.config = config
            self._step.clear()

        return back

    @while_open
    def state_dict(self, directory: str | Path | None = None, *, best: AverageValues | None = None) -> dict[str, Any]:
        """Return the state that `load_state_dict` continues from, with any engine and number of ranks.

        It takes kilobytes and is equal on every rank, except for BatchNorm statistics that differ between ranks. With
        `groups: tensor+row`, the call is collective, and the state has the corrections of all rows and their moments,
        in float32 on the CPU. Give a directory for models with many rows.

        Args:
            directory: with `groups: tensor+row`, write the rows to a file in a new directory inside this one, and
                return a state that names it. Each rank writes its own rows, so all ranks must give this directory on a
                shared file system. Save the state in it, and give it to `load_state_dict`. Each call creates a new
                directory, `state["rows"]["stored"]["directory"]`. The caller removes those that only older states name.
            best: another average of this object, whose rows are also written to the file.

        Raises:
            OutputError: the file could not be written; on every rank.
            StateError: only some ranks give a directory; on every rank.
        """
        rows = None
        if self._rows is not None:
            to = None if directory is None else Path(directory)
            has_directory = self.pods.gather(to is not None)
            with self.pods.agree():
                _require_on_all("state_dict", has_directory)
            rows = self._rows.state() if to is None else self._rows.save(to, self.pods, best and best.rows)
        return self._form.state(self._x, self.optimizer.inner.state_dict(), rows, self._statistics())

    @while_open
    def load_state_dict(self, state: dict[str, Any], directory: str | Path | None = None) -> None:
        """Continue from `state_dict()`. Collective.

        The learning rate is that of the state, as for optimizers of torch: `choose_rate` or `set_lr` may have set it.

        Args:
            state: the state.
            directory: the directory that was given to `state_dict`. Each rank reads its own rows from it.

        Raises:
            StateError: a field is missing or has another type or shape, the candidates or a setting on which the
                coefficients depend differ, or the file of rows is missing or damaged. Raised on every rank; the average
                is unchanged.
        """
        rows_directory = None if directory is None else Path(directory)
        has_directory = [] if self._rows is None else self.pods.gather(rows_directory is not None)
        with self.pods.agree():
            if self._swapped:
                raise TwaError("load_state_dict() inside weights(): leave it first.")
            _require_on_all("load_state_dict", has_directory)
            saved = self._form.checked(state, self._x, self._engine.buffers())
        require_same_state(self.pods, saved)
        if rows_directory and saved.rows and saved.rows.stored:
            require_stored_rows(rows_directory, saved.rows.stored, self.pods)
        with self.pods.agree():
            rows = None if self._rows is None else self._rows.checked(saved.rows, rows_directory)
        self._set(saved.x, None if rows is None else rows["values"], saved.buffers)
        self.optimizer.load_inner(saved.optimizer, rows)
        attached, loaded = self.config.lr, saved.config.lr
        self._form.config = self.config.with_lr(loaded)
        if loaded != attached and self.pods.rank == 0:
            notice(f"optimizer.lr is {loaded:g}, that of the loaded state; before, it was {attached:g}.")

    @while_open
    def copy_values(self) -> AverageValues:
        """Return copies of the coefficients, of the corrections of this rank's rows and of the BatchNorm statistics."""
        statistics = {name: buffer.detach().cpu().clone() for name, buffer in self._statistics().items()}
        x, rows = self._written.saved()
        return AverageValues(x.cpu(), self.coefficients.cpu(), rows, statistics)

    @while_open
    def values_in_state(self, kept: KeptState, rows: RowsState | None, directory: Path) -> AverageValues:
        """Return the best average of the state of a run, with the rows of this rank. Collective.

        Args:
            kept: the average.
            rows: its rows, with `groups: tensor+row`.
            directory: the directory of the state.

        Raises:
            StateError: the file of the rows cannot be read; on every rank.
        """
        with self.pods.agree():
            local_rows = None if self._rows is None or rows is None else self._rows.local(rows, directory)
        return AverageValues(kept.x, kept.coefficients, local_rows, kept.buffers)

    @while_open
    def set_values(self, values: AverageValues) -> None:
        """Set the coefficients, the corrections of rows and the statistics, and write the weights. Collective."""
        self._set(values.x, values.rows, values.buffers)

    def _set(self, x: torch.Tensor, rows: torch.Tensor | None, buffers: Mapping[str, torch.Tensor]) -> None:
        self._written.set(x, rows)
        self._step.clear()
        live = self._engine.buffers()
        for name, value in buffers.items():
            live[name].copy_(value)

    def _statistics(self) -> dict[str, torch.Tensor]:
        names = batchnorm.statistics(self._engine.module, self._engine.buffers())
        return {name: buffer for name, buffer in self._swapped.own_buffers().items() if name in names}


def _require_on_all(call: str, has_directory: list[bool]) -> None:
    """Check that all ranks or none give a directory. `has_directory` has one value for each rank."""
    if len(set(has_directory)) > 1:
        rank_with, rank_without = has_directory.index(True), has_directory.index(False)
        raise StateError(
            f"{call}: rank {rank_with} gives a directory and rank {rank_without} does not. Give the directory on all "
            "ranks, or on none."
        )
