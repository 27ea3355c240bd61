"""Atomic publication: an output is prepared under a temporary name, and then takes its name in one step."""

import errno
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from twa_scale.base.inputs import open_regular
from twa_scale.base.paths import path_of
from twa_scale.base.sizes import size_text
from twa_scale.errors import OutputError
from twa_scale.output.exchange import exchange
from twa_scale.output.overwriting import check_replaceable
from twa_scale.output.temporary import TemporaryName

_HINTS = {
    errno.ENOSPC: "Free some space, or choose another disk",
    errno.EDQUOT: "Your quota is used up: free some space, or choose another disk",
    errno.EFBIG: "Raise the limit on file sizes (`ulimit -f`), or write smaller shards",
    errno.EACCES: "Choose a directory that you may write to",
    errno.EPERM: "Choose a directory that you may write to",
    errno.EROFS: "Choose a directory that you may write to",
}
_ENDINGS = {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".json"}


@contextmanager
def output_errors(target: Path) -> Iterator[None]:
    """Replace an OSError of the body by an OutputError that names the target, the reason and the fix."""
    try:
        yield
    except OSError as error:
        hint = _HINTS.get(error.errno or 0, "Choose another directory, or repair this one")
        raise OutputError(
            f"{target}: could not be written: {error.strerror or error}{_other(error, target)}. {hint}. "
            "No temporary file remains, and an earlier output is unchanged."
        ) from error


def _other(error: OSError, target: Path) -> str:
    """Return the name of the file that failed, in brackets, if it is not part of the output."""
    foreign = error.filename and not Path(error.filename).is_relative_to(target.parent)
    return f" ({error.filename})" if foreign else ""


def target_of(out: object) -> Path:
    """Return the absolute path of the output directory `out`.

    Raises:
        OutputError: `out` is not a path.
    """
    if not isinstance(out, str | Path):
        raise OutputError(f"{out!r} is not a path; name the directory to write.")
    return path_of(out, OutputError).resolve()


def check_target(target: Path, nbytes: int, overwrite: bool) -> None:
    """Check that an output can be published as `target`.

    Args:
        target: the output directory.
        nbytes: the size of the output in bytes.
        overwrite: whether it may replace an earlier output.

    Raises:
        OutputError: `target` is a file or has the name of one, is a mount point or a directory that must not be
            replaced, or the disk is full.
    """
    if target.exists() and not target.is_dir():
        raise OutputError(f"{target}: is a file; the output is a directory. Choose another name.")
    if not target.exists() and target.suffix in _ENDINGS:
        raise OutputError(
            f"{target}: {target.suffix} is the ending of a file; the output is a directory. Choose another name, for "
            f"example {target.stem}."
        )
    if target.is_dir():
        if target.is_mount():
            raise OutputError(f"{target}: is a mount point, which a rename cannot replace. Name a directory below it.")
        check_replaceable(target, overwrite)
    parent = next(parent for parent in target.parents if parent.exists())
    free = shutil.disk_usage(parent).free
    if free < nbytes:
        raise OutputError(
            f"{target}: needs {size_text(nbytes)}, but only {size_text(free)} are free there. Free some space, or "
            "choose another disk."
        )


def check_inputs_outside(out: object, inputs: Sequence[str]) -> None:
    """Check that no candidate is inside the output directory, because overwriting would delete it.

    Raises:
        OutputError: a candidate is inside it.
    """
    target = target_of(out)
    for label in inputs:
        path = Path(label).resolve()
        if path.exists() and path.is_relative_to(target):
            raise OutputError(f"{target}: holds the candidate {label}. Choose another output directory.")


def publish(temporary: Path, target: Path) -> None:
    """Rename a finished directory to `target`. An earlier output is then at `temporary`, or deleted.

    If the file system can exchange two names, `target` exists at any time. Otherwise there is a moment between two
    renames in which it does not. `remove_leftovers` restores an earlier output after a kill in that moment.
    """
    for folder in (temporary, *(path for path in temporary.rglob("*") if path.is_dir())):
        sync(folder)
    if not target.exists() or not any(target.iterdir()):
        temporary.rename(target)
    elif not exchange(temporary, target):
        with TemporaryName(target, "old") as old:
            target.rename(old.path)
            temporary.rename(target)
            sync(target.parent)
        return
    sync(target.parent)


def sync(directory: Path) -> None:
    """Flush the names in a directory to the disk."""
    with suppress(OSError):  # Some file systems do not support it, and the output is complete.
        handle = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def write_file(path: Path, content: bytes | Path) -> None:
    """Write or copy a small file and flush it to the disk."""
    with path.open("wb") as file:
        file.write(content if isinstance(content, bytes) else content_of(content))
        file.flush()
        os.fsync(file.fileno())


def content_of(path: Path) -> bytes:
    """Return the content of a regular file.

    Raises:
        OutputError: it is not a regular file.
        OSError: it cannot be read.
    """
    with os.fdopen(open_regular(path, OutputError), "rb") as file:
        return file.read()


def replace_file(path: Path, content: bytes) -> None:
    """Write a file atomically: `path` is the old file until the new one is complete.

    Raises:
        OutputError: the file could not be written. The old file is unchanged.
    """
    with replacing(path) as temporary:
        temporary.write_bytes(content)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield the name of a temporary file, which the body writes, and which is `path` when it is complete.

    Raises:
        OutputError: the file could not be written. The old file is unchanged.
    """
    with output_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryName(path) as temporary:
            yield temporary.path
            with temporary.path.open("rb") as file:
                os.fsync(file.fileno())
            temporary.path.replace(path)
            sync(path.parent)
