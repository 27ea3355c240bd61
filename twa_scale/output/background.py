"""Files written by a thread while training goes on, from copies of the values."""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress

import torch

from twa_scale.base.spans import Span
from twa_scale.output.publish import reported
from twa_scale.output.ranks_writer import Writer
from twa_scale.output.small_files import Files
from twa_scale.ranks import Group

_LOG = logging.getLogger(__name__)
_POLL = 0.2  # seconds between two looks for the marks of other ranks
_GRACE = 120.0  # seconds without progress of other ranks after which a program that has ended gives up on them


class BackgroundWrite:
    """Writes this rank's values; the first rank publishes when all have written.

    The thread takes part in no collective, which would mix with those of training: ranks leave marks beside the files,
    on the file system that they share. The thread outlives the main program, which so ends when its files are written.

    Args:
        writer: open for all tensors, from `begin`.
        values: copies that nobody changes; let go of one by one.
        group: the ranks that write.
        files: small files to publish beside the weights.
        published: called on the first rank when the directory has its name.
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
        writer.hand_over()
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
        """Whether this rank still has something to do."""
        return self._thread.is_alive()

    def join(self, group: Group) -> None:
        """Wait until the files are published. Collective, on the main thread.

        Raises:
            OutputError: on every rank; nothing is left behind.
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
            _LOG.warning("%s", error)  # nobody may ask any more
        self._values.clear()
        self._mark("failed" if self._write_error else "done")
        self._written.set()
        if self._rank == 0:
            try:
                with reported(self._writer.target):
                    self._publish()
            except Exception as error:
                self._publish_error = error
                _LOG.warning("%s", error)
            finally:
                self._writer.discard()

    def _write(self) -> None:
        try:
            while self._values:
                self._writer.write(*self._values.pop(), masks=True)  # what is not finite was refused when it was copied
            self._writer.sync()
        finally:
            self._writer.close()

    def _mark(self, word: str) -> None:
        with suppress(OSError):  # without it `join` finds out
            (self._writer.directory / f".{word}-{self._rank}").touch()

    def _publish(self) -> None:
        if not self._all_written():
            return
        for mark in self._writer.directory.glob(".done-*"):
            mark.unlink()
        self._writer.publish(self._files)
        self._published()

    def _all_written(self) -> bool:
        """Wait for the marks of all ranks, for what `join` finds out, or for the end of a program that lost ranks."""
        progress: object = None
        since = time.monotonic()
        while not self._decided.wait(_POLL):
            found = {path.name: path.stat().st_mtime_ns for path in self._writer.directory.iterdir()}
            if all(f".done-{rank}" in found or f".failed-{rank}" in found for rank in range(self._size)):
                return not any(name.startswith(".failed-") for name in found)
            if found != progress or threading.main_thread().is_alive():
                progress, since = found, time.monotonic()
            if time.monotonic() - since > _GRACE:
                _LOG.warning("%s: given up, other ranks have not written their part", self._writer.target)
                return False
        return self._all_wrote
