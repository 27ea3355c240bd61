"""Copies of files in bounded memory."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from twa_scale.base.inputs import open_regular
from twa_scale.base.paths import identity_of
from twa_scale.errors import OutputError
from twa_scale.output.disk import pieces_of, write_at


@dataclass(frozen=True)
class Copy:
    """A file that an output copies."""

    name: str
    """The path in the output directory."""
    source: Path
    version: tuple[int, int]
    """The size and the time of the last change of the source, in bytes and nanoseconds, which must not change."""
    skipped_ranges: Sequence[tuple[int, int]] = ()
    """Ranges of bytes that are not copied, but become holes."""

    @property
    def is_visible(self) -> bool:
        """Whether this rank sees the source as it is described here."""
        try:
            return version_of(self.source.stat()) == self.version
        except OSError:
            return False


def version_of(stat: os.stat_result) -> tuple[int, int]:
    """Return the size and the time of the last change of a file."""
    return identity_of(stat)[2:]


def copy_file(copy: Copy, directory: Path) -> None:
    """Copy a file into the output directory, and flush it to the disk. Folders are created.

    Raises:
        OSError: the disk is full or fails.
        OutputError: the source is not a regular file, or has changed.
    """
    target = directory / copy.name
    target.parent.mkdir(parents=True, exist_ok=True)
    source = open_regular(copy.source, OutputError)
    with os.fdopen(source, "rb", buffering=0) as old, target.open("wb", buffering=0) as new:
        _require_unchanged(copy, old.fileno())
        size, position = copy.version[0], 0
        for begin, end in [*sorted(copy.skipped_ranges), (size, size)]:
            for offset, piece in pieces_of(old.fileno(), position, begin):
                write_at(new.fileno(), piece, offset)
            position = max(position, end)
        new.truncate(size)
        os.fsync(new.fileno())
        _require_unchanged(copy, old.fileno())


def _require_unchanged(copy: Copy, handle: int) -> None:
    if version_of(os.fstat(handle)) != copy.version:
        raise OutputError(
            f"{copy.source}: has changed since it was opened; --format same (format='same') copies it. Candidates must "
            "not change until the run has ended."
        )
