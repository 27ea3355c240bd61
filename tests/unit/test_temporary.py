"""Outputs are complete at any time, and temporary files are removed after their owner has ended."""

import json
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from tests.forked_modules import run_module
from tests.kill_while_writing import KILLS
from twa_scale.candidates import open_candidates
from twa_scale.errors import CandidateError
from twa_scale.output.publish import publish, replace_file
from twa_scale.output.temporary import TemporaryName, remove_leftovers

FORK = multiprocessing.get_context("fork")


def remaining(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def prepare(target: Path) -> TemporaryName:
    hidden = TemporaryName(target, "tmp")
    hidden.path.mkdir()
    (hidden.path / "weights").write_bytes(b"0")
    return hidden


@pytest.fixture(scope="module")
def kills(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, int]]:
    seed = str(time.time_ns() % 1000)
    print("seed", seed)
    ran = run_module("tests.kill_while_writing", tmp_path_factory.mktemp("kills"), seed, timeout=300)
    assert ran.returncode == 0, ran.stderr
    actual: dict[str, dict[str, int]] = json.loads(ran.stdout)
    return actual


@pytest.mark.parametrize("mode", KILLS)
def test_killed_writers_leave_a_complete_output(kills: dict[str, dict[str, int]], mode: str) -> None:
    actual = kills[mode]
    assert actual["killed"] == actual["complete afterwards"] == KILLS[mode] and actual["left"] == 0
    assert actual["hidden"] > 0
    absent = actual.get("absent", 0)
    assert actual.get("complete", 0) + absent == KILLS[mode]
    assert absent == {"exchange": 0, "between": KILLS[mode]}.get(mode, absent)


def hold(target: Path, ready: Connection) -> None:
    hidden = prepare(target)
    ready.send(hidden.path.name)
    time.sleep(60)


@contextmanager
def holding(target: Path, run: Callable[[Path, Connection], None] = hold) -> Iterator[tuple[int, str]]:
    """Run a process that holds a temporary name. Yield its id and the name."""
    receive, send = FORK.Pipe(duplex=False)
    process = FORK.Process(target=run, args=(target, send))
    process.start()
    assert process.pid is not None
    try:
        yield process.pid, receive.recv()
    finally:
        process.kill()
        process.join()


def test_temporary_names_of_running_processes_are_kept(tmp_path: Path) -> None:
    with holding(tmp_path / "out") as (pid, name):
        os.kill(pid, signal.SIGSTOP)
        remove_leftovers(tmp_path)
        assert remaining(tmp_path) == [name, f"{name}.lock"]
    remove_leftovers(tmp_path, "other")
    assert remaining(tmp_path) == [name, f"{name}.lock"]
    remove_leftovers(tmp_path, "out")
    assert remaining(tmp_path) == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_killing_signals_remove_temporary_files(tmp_path: Path, number: int, default_handlers: None) -> None:
    with holding(tmp_path / "out") as (pid, _):
        os.kill(pid, number)
        _, status = os.waitpid(pid, 0)
        assert os.WTERMSIG(status) == number
        assert remaining(tmp_path) == []


def wait(ready: Connection) -> None:
    ready.send(None)
    time.sleep(60)


def hold_and_fork(target: Path, ready: Connection) -> None:
    hidden = prepare(target)
    receive, send = FORK.Pipe(duplex=False)
    worker = FORK.Process(target=wait, args=(send,))
    worker.start()
    receive.recv()
    worker.terminate()
    worker.join()
    FORK.Process(target=time.sleep, args=(5,)).start()
    ready.send(f"{hidden.path.name} {worker.exitcode}")
    time.sleep(60)


def test_forked_children_do_not_hold_locks(tmp_path: Path) -> None:
    with holding(tmp_path / "out", hold_and_fork) as (_, messages):
        name, code = messages.split()
        assert remaining(tmp_path) == [name, f"{name}.lock"] and int(code) == -signal.SIGTERM
    remove_leftovers(tmp_path)  # while another worker still runs
    assert remaining(tmp_path) == []


@pytest.fixture
def default_handlers() -> Iterator[None]:
    """Restore the default handlers, because the process that runs the tests may ignore signals."""
    before = {number: signal.signal(number, signal.SIG_DFL) for number in (signal.SIGTERM, signal.SIGHUP)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_existing_handlers_are_kept(tmp_path: Path, default_handlers: None) -> None:
    caught = []
    before = signal.signal(signal.SIGTERM, lambda number, _: caught.append(number))
    try:
        with prepare(tmp_path / "out") as hidden:
            os.kill(os.getpid(), signal.SIGTERM)
            assert caught == [signal.SIGTERM] and hidden.path.exists()
            assert signal.getsignal(signal.SIGHUP) is not signal.SIG_DFL
    finally:
        signal.signal(signal.SIGTERM, before)
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_DFL and remaining(tmp_path) == []


def test_deferred_removal_needs_no_signal_handlers(tmp_path: Path, default_handlers: None) -> None:
    """While another thread writes, SIGTERM has its previous handler."""
    hidden = prepare(tmp_path / "out")
    assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
    with prepare(tmp_path / "other"):
        hidden.leave_to_next_start()
        assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL and hidden.path.exists()

    def discard() -> None:
        prepare(tmp_path / "third").discard()
        hidden.discard()

    thread = threading.Thread(target=discard)
    thread.start()
    thread.join()
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL and remaining(tmp_path) == []


def test_lock_without_a_temporary_file(tmp_path: Path) -> None:
    (tmp_path / ".out.tmp-0a1b2c3d.lock").touch()  # killed before the first byte
    remove_leftovers(tmp_path)
    assert remaining(tmp_path) == []


@pytest.mark.parametrize("old", [False, True])
def test_locks_of_other_hosts_are_kept_for_a_day(tmp_path: Path, old: bool) -> None:
    with holding(tmp_path / "out") as (_, name):
        pass
    lock = tmp_path / f"{name}.lock"
    lock.write_bytes(b"another start of another host")
    if old:
        for path in (lock, *(tmp_path / name).rglob("*"), tmp_path / name):
            os.utime(path, (0, time.time() - 25 * 3600))
    remove_leftovers(tmp_path)
    assert remaining(tmp_path) == ([] if old else [name, lock.name])


def test_output_that_was_being_replaced_is_restored(tmp_path: Path) -> None:
    out = tmp_path / "out"
    for current in (None, b"new"):
        with holding(out) as (_, name):
            pass
        for suffix in ("", ".lock"):
            (tmp_path / (name + suffix)).rename(tmp_path / (name.replace(".tmp-", ".old-") + suffix))
        if current:
            (out / "weights").write_bytes(current)
        if not current:
            with pytest.raises(CandidateError, match=r"killed.*\.out\.old-"):
                open_candidates([out], minimum=1)
        remove_leftovers(tmp_path)
        assert remaining(tmp_path) == ["out"] and (out / "weights").read_bytes() == (current or b"0")


def test_publish_does_not_replace_a_file(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.write_bytes(b"a file")
    with prepare(out) as hidden, pytest.raises(OSError, match="directory"):
        publish(hidden.path, out)
    assert remaining(tmp_path) == ["out"] and out.read_bytes() == b"a file"


def test_replace_file(tmp_path: Path) -> None:
    for content in (b"old", b"new"):
        replace_file(tmp_path / "state", content)
        assert remaining(tmp_path) == ["state"] and (tmp_path / "state").read_bytes() == content
