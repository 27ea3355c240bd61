"""Writing an output in a thread while training continues."""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress

import torch

from twa_scale.base.spans import Span
from twa_scale.output.publish import output_errors
from twa_scale.output.ranks_writer import Writer
from twa_scale.output.small_files import Files
from twa_scale.ranks import Group

_LOG = logging.getLogger(__name__)
_POLL = 0.2  # seconds between two checks of the markers of other ranks
_WAIT_SECONDS = 120.0
"""Seconds without progress of other ranks, after which a program at its end stops waiting for them."""


class BackgroundWrite:
    """A thread that writes the values of this rank. The first rank publishes the output when all ranks have written.

    The thread takes part in no collective, because it would interfere with those of training. Instead, ranks create
    marker files next to the weights, on their shared file system. The process ends only after the thread has ended.

    Args:
        writer: a writer from `open_writer`.
        values: copies of the values of this rank with their spans. They are freed one by one.
        group: the ranks that write.
        files: small files to publish next to the weights.
        published: called on the first rank after the output is published.
    """

    def __init__(
        self,
        writer: Writer,
        values: Sequence[tuple[Span, torch.Tensor]],
        group: Group,
        files: Files,
        published: Callable[[], None],
    ) -> None:
        self._writer = writer
        writer.leave_to_next_start()
        self._values = list(values)
        self._rank, self._size = group.rank, group.size
        self._files = files
        self._published = published
        self._written = threading.Event()
        self._decided = threading.Event()
        self._all_wrote = False
        self._write_error: Exception | None = None
        self._publish_error: Exception | None = None
        self._thread = threading.Thread(target=self._run, name=f"write {writer.target.name}", daemon=False)
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether the thread still runs."""
        return self._thread.is_alive()

    def join(self, group: Group) -> None:
        """Wait until the output is published. Collective; call it on the main thread.

        Raises:
            OutputError: the output could not be written. Raised on every rank; no temporary files remain.
        """
        self._written.wait()
        try:
            with group.agree():
                if self._write_error:
                    raise self._write_error
            self._all_wrote = True
        finally:
            self._decided.set()
            self._thread.join()
        with group.agree():
            if self._publish_error:
                raise self._publish_error

    def _run(self) -> None:
        try:
            self._write()
        except Exception as error:
            self._write_error = error
            _LOG.warning("%s", error)  # The program may end without calling `join`.
        self._values.clear()
        self._create_marker("failed" if self._write_error else "done")
        self._written.set()
        if self._rank == 0:
            try:
                with output_errors(self._writer.target):
                    self._publish()
            except Exception as error:
                self._publish_error = error
                _LOG.warning("%s", error)
            finally:
                self._writer.discard()

    def _write(self) -> None:
        try:
            while self._values:
                self._writer.write(*self._values.pop(), allow_infinite=True)  # `Snapshots` has checked the copies.
            self._writer.sync()
        finally:
            self._writer.close()

    def _create_marker(self, state: str) -> None:
        with suppress(OSError):  # `join` does not need the marker.
            (self._writer.directory / f".{state}-{self._rank}").touch()

    def _publish(self) -> None:
        if not self._all_written():
            return
        for marker in self._writer.directory.glob(".done-*"):
            marker.unlink()
        self._writer.publish(self._files, self._published)

    def _all_written(self) -> bool:
        """Wait for the markers of all ranks or the result of `join`; give up on missing ranks after `_WAIT_SECONDS`."""
        progress: object = None
        last_change = time.monotonic()
        while not self._decided.wait(_POLL):
            times = {path.name: path.stat().st_mtime_ns for path in self._writer.directory.iterdir()}
            if all(f".done-{rank}" in times or f".failed-{rank}" in times for rank in range(self._size)):
                return not any(name.startswith(".failed-") for name in times)
            if times != progress or threading.main_thread().is_alive():
                progress, last_change = times, time.monotonic()
            if time.monotonic() - last_change > _WAIT_SECONDS:
                _LOG.warning("%s: not published, because other ranks have not written their part", self._writer.target)
                return False
        return self._all_wrote
