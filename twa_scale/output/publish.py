"""A directory that appears complete or not at all: prepared under a hidden name, which is then exchanged."""

import errno
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from twa_scale.base.inputs import open_regular
from twa_scale.base.paths import path_of
from twa_scale.errors import OutputError
from twa_scale.output.exchange import exchange
from twa_scale.output.overwriting import check_replaceable
from twa_scale.output.temporary import HiddenName

_HINTS = {
    errno.ENOSPC: "Free some space, or choose another disk",
    errno.EDQUOT: "Your quota is used up: free some space, or choose another disk",
    errno.EFBIG: "Raise the limit on file sizes (`ulimit -f`), or write smaller shards",
    errno.EACCES: "Choose a directory that you may write to",
    errno.EPERM: "Choose a directory that you may write to",
    errno.EROFS: "Choose a directory that you may write to",
}


@contextmanager
def reported(target: Path) -> Iterator[None]:
    """Turn what the operating system refuses into an OutputError that names the target and the fix."""
    try:
        yield
    except OSError as error:
        hint = _HINTS.get(error.errno or 0, "Choose another directory, or repair this one")
        raise OutputError(
            f"{target}: could not be written: {error.strerror or error}{_other(error, target)}. {hint}. "
            "Nothing is left behind, and what stood there is as it was."
        ) from error


def _other(error: OSError, target: Path) -> str:
    """Name the file at fault when it is not one of the output, such as a side file that cannot be read."""
    foreign = error.filename and not Path(error.filename).is_relative_to(target.parent)
    return f" ({error.filename})" if foreign else ""


def target_of(out: object) -> Path:
    """Return the directory that a user names.

    Raises:
        OutputError: what is no path.
    """
    if not isinstance(out, str | Path):
        raise OutputError(f"{out!r} is no path; name the directory to write.")
    return path_of(out, OutputError).resolve()


def check_target(target: Path, nbytes: int, overwrite: bool) -> None:
    """Refuse, before anything is written, a target that could not be published.

    Raises:
        OutputError: names the rule and the fix.
    """
    if target.exists() and not target.is_dir():
        raise OutputError(f"{target}: is a file; the output is a directory. Choose another name.")
    if target.is_dir():
        if target.is_mount():
            raise OutputError(f"{target}: is a mount point, which no rename can replace. Name a directory below it.")
        check_replaceable(target, overwrite)
    parent = next(parent for parent in target.parents if parent.exists())
    free = shutil.disk_usage(parent).free
    if free < nbytes:
        raise OutputError(
            f"{target}: needs {nbytes / 1e9:.3f} GB, but only {free / 1e9:.3f} GB are free there. Free some "
            "space, or choose another disk."
        )


def check_apart(out: object, inputs: Sequence[str]) -> None:
    """Refuse a target that holds what it is made of: overwriting it would destroy that.

    Raises:
        OutputError: names the candidate.
    """
    target = target_of(out)
    for label in inputs:
        path = Path(label).resolve()
        if path.exists() and path.is_relative_to(target):
            raise OutputError(f"{target}: holds the candidate {label}. Choose another output directory.")


def publish(temporary: Path, target: Path) -> None:
    """Give a finished directory its name; an older output is at `temporary` then, or gone.

    Where names can be exchanged in one call, `target` is never absent. Elsewhere two renames leave a moment in which it
    is; what a kill in that moment leaves is put in order by `hidden.sweep`.
    """
    for folder in (temporary, *(path for path in temporary.rglob("*") if path.is_dir())):
        sync(folder)
    if not target.exists() or not any(target.iterdir()):
        temporary.rename(target)
    elif not exchange(temporary, target):
        with HiddenName(target, "old") as aside:
            target.rename(aside.path)
            temporary.rename(target)
            sync(target.parent)
        return
    sync(target.parent)


def sync(directory: Path) -> None:
    """Make the names in a directory survive a power cut."""
    with suppress(OSError):  # not every file system can do it, and by now nothing would be won by an error
        handle = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def write_file(path: Path, content: bytes | Path) -> None:
    """Write a small file, or copy one, and make its content survive a power cut."""
    with path.open("wb") as file:
        file.write(content if isinstance(content, bytes) else _content(content))
        file.flush()
        os.fsync(file.fileno())


def _content(path: Path) -> bytes:
    with os.fdopen(open_regular(path, OutputError), "rb") as file:
        return file.read()


def replace_file(path: Path, content: bytes) -> None:
    """Write a file that appears complete or not at all; an older one of this name stays until then.

    Raises:
        OutputError: the old file is as it was.
    """
    with reported(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with HiddenName(path) as hidden:
            write_file(hidden.path, content)
            hidden.path.replace(path)
            sync(path.parent)
