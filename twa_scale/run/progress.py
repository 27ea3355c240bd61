"""The console output of a run: progress bars and tables, on rank 0 only."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import rich.progress
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Table

from twa_scale.candidates.read_ahead import Progress
from twa_scale.run import comparison


class Report:
    """The console output on standard error. Nothing is printed unless `active`."""

    def __init__(self, *, active: bool = True) -> None:
        self.active = active
        self._console = Console(stderr=True, emoji=False, quiet=not active)

    def log(self, text: str) -> None:
        """Print one line, above a running bar."""
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    @contextmanager
    def bytes(self, description: str) -> Iterator[Progress]:
        """Show a progress bar of bytes in a `with` block, which calls the yielded function with (new, total)."""
        columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
        with self._bar(*columns, TimeRemainingColumn()) as bar:
            task = bar.add_task(description, total=None)
            yield lambda nbytes, total: bar.update(task, advance=nbytes, total=total)

    @contextmanager
    def steps(self, description: str, total: int, done: int) -> Iterator[Callable[[dict[str, float]], None]]:
        """Show a progress bar of steps in a `with` block, which calls the yielded function with each step's values."""
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with self._bar(*columns, TextColumn("{task.fields[note]}")) as bar:
            task = bar.add_task(description, total=total, completed=done, note="")

            def advance(values: dict[str, float]) -> None:
                bar.update(task, advance=1, note=f"loss {values['loss']:.4f}")

            yield advance

    def finish(self, output: Path, summary: dict[str, Any]) -> None:
        """Print the comparison, the cost of a step, and the paths of the results."""
        self._console.print(metrics_table(summary["evaluated_on"], comparison.rows(summary)))
        for text in (summary["exported_as"], summary["verdict"], summary["advice"]):
            if text:
                self.log(text)
        self._console.print(_cost_table(summary))
        steps = summary["steps"]
        self.log(f"{steps} steps; the average is in {output / 'average'}, the plot is {output / 'coefficients.png'}")

    def _bar(self, *columns: Any) -> rich.progress.Progress:
        # A bar on a console that cannot redraw lines prints an empty line.
        visible = self.active and (self._console.is_interactive or self._console.is_jupyter)
        return rich.progress.Progress(*columns, console=self._console, transient=True, disable=not visible)


def metrics_table(title: str, rows: Sequence[tuple[str, Mapping[str, float]]]) -> Table:
    """Return a table of the metrics of weights, which have labels."""
    table = Table(title=title)
    table.add_column("weights", overflow="fold")
    names = dict.fromkeys(name for _, metrics in rows for name in metrics)
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)
    for label, metrics in rows:
        table.add_row(escape(label), *(f"{metrics[name]:.6g}" if name in metrics else "" for name in names))
    return table


def _cost_table(summary: dict[str, Any]) -> Table:
    table = Table(title=f"One step of rank 0, {summary['ranks']} ranks")
    for column in ("part", "ms", "MB moved", "GB/s", "of read bandwidth"):
        table.add_column(column, justify="left" if column == "part" else "right")
    bandwidth = summary["read_bandwidth"]
    table.add_row("forward + backward", f"{summary['forward_backward_seconds'] * 1e3:.2f}", "", "", "")
    for part, cost in summary["cost"].items():
        speed = cost["bytes"] / cost["seconds"] if cost["seconds"] else 0.0
        moved = (
            (f"{cost['bytes'] / 1e6:.2f}", f"{speed / 1e9:.2f}", f"{speed / bandwidth:.0%}")
            if cost["bytes"]
            else ("",) * 3
        )
        table.add_row(part, f"{cost['seconds'] * 1e3:.2f}", *moved)
    return table
