"""The lock on an output directory, which one process holds until it ends."""

import errno
import json
import multiprocessing
import os
import signal
import threading
from multiprocessing.connection import Connection
from pathlib import Path
from unittest.mock import patch

import pytest

from twa_scale.errors import OutputError
from twa_scale.output import DirectoryLock
from twa_scale.output.lock import LOCK


def hold(directory: Path, pipe: Connection) -> None:
    DirectoryLock(directory).take()
    pipe.send(os.getpid())
    threading.Event().wait()


def test_lock_ends_with_its_owner(tmp_path: Path) -> None:
    working_directory, there = multiprocessing.Pipe()
    owner = multiprocessing.get_context("fork").Process(target=hold, args=(tmp_path, there), daemon=True)
    owner.start()
    pid = working_directory.recv()
    lock = DirectoryLock(tmp_path)
    with pytest.raises(OutputError, match=rf"{tmp_path}.*process {pid} on host"):
        lock.take()
    os.kill(pid, signal.SIGKILL)
    owner.join()
    assert (tmp_path / LOCK).exists()
    lock.take()
    assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()
    lock.release()
    assert list(tmp_path.iterdir()) == []


def test_forked_child_does_not_hold_the_lock(tmp_path: Path) -> None:
    lock = DirectoryLock(tmp_path)
    lock.take()
    child = multiprocessing.get_context("fork").Process(target=threading.Event().wait, daemon=True)
    child.start()
    try:
        lock.release()
        with DirectoryLock(tmp_path) as other:
            other.take()
    finally:
        child.kill()
        child.join()


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b'{"pid": "x"}', b"\xff"])
def test_lock_file_with_invalid_content(tmp_path: Path, content: bytes) -> None:
    with DirectoryLock(tmp_path) as lock:
        lock.take()
        (tmp_path / LOCK).write_bytes(content)
        with pytest.raises(OutputError, match="another run"):
            DirectoryLock(tmp_path).take()


def test_removed_lock_file(tmp_path: Path) -> None:
    with DirectoryLock(tmp_path) as first, DirectoryLock(tmp_path) as second:
        first.take()
        (tmp_path / LOCK).unlink()
        second.take()
        with pytest.raises(OutputError):
            DirectoryLock(tmp_path).take()


@pytest.mark.parametrize("content", [b"my own", b'{"mine": 1}'])
def test_file_of_another_program_is_kept(tmp_path: Path, content: bytes) -> None:
    (tmp_path / LOCK).write_bytes(content)
    for lock in (DirectoryLock(tmp_path), DirectoryLock(tmp_path)):
        with pytest.raises(OutputError, match=r"\.lock.*Move it away"):
            lock.take()
    assert (tmp_path / LOCK).read_bytes() == content


def test_symbolic_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "mine").write_bytes(b"")
    (tmp_path / LOCK).symlink_to(tmp_path / "mine")
    with pytest.raises(OutputError, match="could not be written"):
        DirectoryLock(tmp_path).take()
    assert (tmp_path / "mine").read_bytes() == b""


def test_flock_fails(tmp_path: Path) -> None:
    """As on a network file system whose server is unreachable."""

    def fail(*_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with patch("fcntl.flock", fail), pytest.raises(OutputError, match=os.strerror(errno.EIO)):
        DirectoryLock(tmp_path).take()
    with DirectoryLock(tmp_path) as lock:
        lock.take()


def test_missing_directory(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="missing"):
        DirectoryLock(tmp_path / "missing").take()
