"""Hidden names beside an output, where it is prepared: each belongs to one process for as long as that lives.

A process that is killed leaves what it has prepared. The lock that it held on a file beside it ends with it, so whoever
writes the same output next knows that nobody will finish it.
"""

import fcntl
import os
import re
import secrets
import shutil
import signal
import threading
import time
from contextlib import suppress
from pathlib import Path
from types import FrameType, TracebackType
from typing import Literal, TypeVar

Kind = Literal["tmp", "old"]
Self = TypeVar("Self", bound="HiddenName")

_LOCK = re.compile(r"\.(?P<target>.+)\.(?P<kind>tmp|old)-[0-9a-f]{8}\.lock")
_QUIET = 24 * 3600.0  # seconds without a change, after which a lock that is free here is taken to be free elsewhere
_SIGNALS = (signal.SIGTERM, signal.SIGHUP)


class HiddenName:
    """A hidden name beside `target`, of a file or directory that this process will make there.

    As a context manager, or by `discard`, it removes what stands there. While the main thread works on such a name, a
    process that SIGTERM or SIGHUP would kill removes it before it dies; a process that handles these signals itself is
    left alone. What a thread works on is removed by `sweep`: signals are handled by the main thread only, which may be
    anywhere, and would wait until it is back in Python.

    Args:
        target: what is prepared.
        kind: "tmp" for what is not finished or no longer needed; "old" for an output that was moved aside, which gets
            its name back unless another output has it.

    Raises:
        OSError: the directory cannot be written.
    """

    def __init__(self, target: Path, kind: Kind = "tmp") -> None:
        self._target = target
        self._kind: Kind = kind
        self._handle: int | None = None
        while self._handle is None:
            self.path = target.parent / f".{target.name}.{kind}-{secrets.token_hex(4)}"
            self._lock = _lock_of(self.path)
            self._handle = _locked(self._lock)
        _OWNED.add(self)

    def discard(self) -> None:
        """Remove what stands under the hidden name, and give the name up."""
        if self._handle is None:
            return
        clear(self.path, self._target, self._kind)
        with suppress(OSError):  # what stays is swept later
            if not self.path.exists():
                self._lock.unlink(missing_ok=True)
        self.forget()
        _OWNED.remove(self)

    def hand_over(self) -> None:
        """Leave the name to a thread of this process: signals have the meaning again that they had before."""
        _OWNED.leave(self)

    def forget(self) -> None:
        """Leave what stands under the name to others."""
        if self._handle is not None:
            os.close(self._handle)
        self._handle = None

    def __enter__(self: Self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.discard()


def sweep(directory: Path, name: str | None = None) -> None:
    """Remove what dead processes have left in `directory`; an output that one had moved aside gets its name back.

    What a process holds is known by its lock. A lock that was taken on another host, or before this host started, may
    not be seen from here on every file system: then what belongs to it must not have changed for a day either.

    Args:
        directory: where outputs are written; it may be missing.
        name: of the output whose leavings are removed; all when not given.
    """
    try:
        found = sorted(path for path in directory.iterdir() if path.name.endswith(".lock"))  # "old" before "tmp"
    except OSError:
        return
    for lock in found:
        match = _LOCK.fullmatch(lock.name)
        if match and name in (None, match["target"]):
            with suppress(OSError):
                _sweep(lock, directory / match["target"], "old" if match["kind"] == "old" else "tmp")


def _sweep(lock: Path, target: Path, kind: Kind) -> None:
    hidden = lock.with_name(lock.name.removesuffix(".lock"))
    handle = os.open(lock, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        if _is_dead(handle, hidden):
            clear(hidden, target, kind)
            if not hidden.exists():
                lock.unlink(missing_ok=True)
    finally:
        os.close(handle)


def clear(hidden: Path, target: Path, kind: Kind) -> None:
    """Remove a hidden file or directory; one of kind "old" becomes `target` again where nothing stands there."""
    if kind == "old" and hidden.exists() and not target.exists():
        with suppress(OSError):
            hidden.rename(target)
        return
    if hidden.is_dir() and not hidden.is_symlink():
        shutil.rmtree(hidden, ignore_errors=True)
    else:
        with suppress(OSError):
            hidden.unlink(missing_ok=True)


def _lock_of(hidden: Path) -> Path:
    """Return the file that is locked: beside the hidden name, so that it is never published with what stands there."""
    return hidden.with_name(f"{hidden.name}.lock")


def _locked(lock: Path) -> int | None:
    """Make a file and lock it; None where another process has taken the file, not locked yet, for a dead one's."""
    handle = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        with suppress(OSError):  # not every file system has locks
            fcntl.flock(handle, fcntl.LOCK_EX)
        os.write(handle, _host(handle))
        if lock.exists():
            return handle
    except BaseException:
        lock.unlink(missing_ok=True)
        os.close(handle)
        raise
    os.close(handle)
    return None


def _is_dead(handle: int, hidden: Path) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # no locks here
        seen = False
    else:
        host = os.pread(handle, 100, 0)
        seen = host == _host(handle) if host else not hidden.exists()
    return seen or time.time() - _last_change(handle, hidden) > _QUIET


def _last_change(handle: int, hidden: Path) -> float:
    times = [os.fstat(handle).st_mtime]
    for path in (hidden, *hidden.rglob("*")):
        with suppress(FileNotFoundError):
            times.append(path.lstat().st_mtime)
    return max(times)


def _host(handle: int) -> bytes:
    """Return what is the same for all processes that see each other's locks for certain; nothing where nobody knows.

    That is this start of this host, and this mount of the file system: containers may have mounts of their own.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return b""
    return f"{boot} {os.fstat(handle).st_dev}".encode()


class _Owned:
    """The hidden names of this process. While the main thread works on one, signals that would kill it are handled."""

    def __init__(self) -> None:
        self._names: set[HiddenName] = set()
        self._in_main_thread: set[HiddenName] = set()

    def add(self, name: HiddenName) -> None:
        self._names.add(name)
        if threading.current_thread() is threading.main_thread():
            self._in_main_thread.add(name)
            for number in _SIGNALS:
                if signal.getsignal(number) is signal.SIG_DFL:
                    signal.signal(number, self._die)

    def remove(self, name: HiddenName) -> None:
        self._names.discard(name)
        self.leave(name)

    def leave(self, name: HiddenName) -> None:
        """Stop handling signals for a name."""
        self._in_main_thread.discard(name)
        if not self._in_main_thread and threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                if signal.getsignal(number) == self._die:
                    signal.signal(number, signal.SIG_DFL)

    def forget(self) -> None:
        """Leave all to the process that this one was forked from, which else could not end the locks by its own end."""
        self._in_main_thread.clear()
        while self._names:
            self._names.pop().forget()

    def _die(self, number: int, frame: FrameType | None) -> None:
        for name in list(self._names):
            name.discard()
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)


_OWNED = _Owned()
os.register_at_fork(after_in_child=_OWNED.forget)
