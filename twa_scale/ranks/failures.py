"""Failures of collectives: ranks write heartbeats and errors to the rendezvous store, to find which rank is missing."""

import os
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

import torch.distributed as dist

from twa_scale.errors import RankError

T = TypeVar("T")
_BEATS_PER_TIMEOUT = 20
_MIN_INTERVAL, _MAX_INTERVAL = 0.2, 5.0  # seconds between two heartbeats
_BROKEN = ("gloo", "NCCL", "caused pair closure")  # texts in errors of collectives, which have no special type
_STORE_OWNER = "rank 0, whose process or launcher holds the store of all ranks"
_WAIT_SECONDS = 5.0  # seconds for one exchange with the store or between ranks


class Heartbeat:
    """A thread that writes heartbeats of this rank to the rendezvous store during a `with` block.

    The heartbeats of a frozen process stop. Other ranks read them only after a collective has failed.

    Args:
        timeout: the time limit of collectives, in seconds. The thread writes 20 heartbeats in this time.
    """

    def __init__(self, timeout: float) -> None:
        self._interval = min(max(timeout / _BEATS_PER_TIMEOUT, _MIN_INTERVAL), _MAX_INTERVAL)
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, name="twa-scale-heartbeat", daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join(1.0)  # A frozen store may block the thread forever.

    def _run(self) -> None:
        process = f"{socket.gethostname()}, process {os.getpid()}"
        beat = 0
        with suppress(Exception):  # The store ends with the run, or has ended before it, if its owner failed at once.
            store = connect_to_store()
            while store is not None and not self._done.is_set():
                store.set(_key("heartbeat", dist.get_rank()), f"{self._interval}\n{process}\n{beat}")
                beat += 1
                self._done.wait(self._interval)


@contextmanager
def publish_failure() -> Iterator[None]:
    """Write an error of the body to the rendezvous store, so that ranks that wait for this one can report it."""
    try:
        yield
    except BaseException as error:
        if not (isinstance(error, RankError) or getattr(error, "agreed", False) or is_collective_failure(error)):
            _publish("failed", f"{type(error).__name__}: {error}" if str(error) else type(error).__name__)
        raise


@contextmanager
def rank_errors(group: dist.ProcessGroup | None = None) -> Iterator[None]:
    """Replace the error of a failed collective in the body by one that names the missing rank.

    Args:
        group: the ranks that take part in the collective; None for all ranks.

    Raises:
        RankError: a rank ended, failed, froze, or did not join the collective in time.
    """
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, RankError) or not is_collective_failure(error):
            raise
        raise RankError(_explanation(error, group)) from error


def is_collective_failure(error: BaseException) -> bool:
    """Return whether `error` comes from a failed collective. Gloo raises plain RuntimeErrors."""
    if isinstance(error, dist.DistError | RankError):
        return True
    return isinstance(error, RuntimeError) and any(name in str(error) for name in _BROKEN)


def _explanation(error: RuntimeError, group: dist.ProcessGroup | None) -> str:
    """Return a message that names the missing ranks, from what all ranks have written to the store."""
    me = dist.get_rank()
    others = [rank for rank in dist.get_process_group_ranks(group or dist.group.WORLD) if rank != me]
    cause = call_with_timeout(lambda: _cause(others), 5 * _WAIT_SECONDS) or f"{_STORE_OWNER}, does not answer"
    original = re.sub(r"^\[[^]]*\] ", "", str(error).strip().splitlines()[0])  # without gloo's source location
    return f"rank {me} could not complete a collective: {cause}. ({original.partition('. ')[0]})"


def _cause(others: Sequence[int]) -> str:
    try:
        store = connect_to_store()
    except Exception:  # The store accepts no new connection.
        return f"{_STORE_OWNER}, does not answer"
    if store is None:
        return "some of the other ranks did not join it"
    with suppress(Exception):
        cause = _cause_in_store(others, store)
        store.set(_key("informed", dist.get_rank()), "")
        if dist.get_rank() == 0:  # The store may live in this process, and other ranks still have to read it.
            deadline = time.monotonic() + _WAIT_SECONDS
            missing = [rank for rank in others if not _read(store, "failed", rank)]
            while missing and time.monotonic() < deadline:
                time.sleep(_MIN_INTERVAL)
                missing = [rank for rank in missing if not store.check([_key("informed", rank)])]
        return cause
    return f"{_STORE_OWNER}, has ended"


def _cause_in_store(others: Sequence[int], store: Any) -> str:
    """Report that this rank waits, give the others time to report the same, and return which did not, and why."""
    store.set(_key("waits", dist.get_rank()), "")
    before = {rank: _read(store, "heartbeat", rank) for rank in others}
    heartbeats = {rank: text.splitlines() for rank, text in before.items() if text}
    slowest = max((float(interval) for interval, *_ in heartbeats.values()), default=_WAIT_SECONDS / 3)
    deadline = time.monotonic() + 3 * slowest
    while time.monotonic() < deadline:
        failed = {rank: failure for rank in others if (failure := _read(store, "failed", rank))}
        if failed:
            return "; ".join(f"rank {rank} failed ({failure})" for rank, failure in failed.items())
        if all(store.check([_key("waits", rank)]) for rank in others):
            return "no rank is missing: the network between them failed, or they take part in different collectives"
        time.sleep(slowest / 5)
    silent = [rank for rank in heartbeats if _read(store, "heartbeat", rank) == before[rank]]
    if silent:
        named = ", ".join(f"rank {rank} ({heartbeats[rank][1]})" for rank in silent)
        return f"{named} sends no heartbeat: frozen, or its process or node is gone"
    named = " and ".join(f"rank {rank}" for rank in others if not store.check([_key("waits", rank)]))
    return f"{named} did not join it: busy, frozen or gone. Check its log; `timeout` sets how long ranks wait"


def _publish(topic: str, text: str) -> None:
    if not (dist.is_available() and dist.is_initialized()):
        return

    def write() -> None:
        store = connect_to_store()
        if store is not None:
            store.set(_key(topic, dist.get_rank()), text)

    call_with_timeout(write, _WAIT_SECONDS)


def call_with_timeout(function: Callable[[], T], seconds: float = _WAIT_SECONDS) -> T | None:
    """Return the result of `function`, or None if it raises an error or takes longer than `seconds`.

    Calls to the store need this because its owner may be frozen.
    """
    results: list[T] = []

    def run() -> None:
        with suppress(Exception):
            results.append(function())

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    return results[0] if results else None


def _read(store: Any, topic: str, rank: int) -> str:
    key = _key(topic, rank)
    return bytes(store.get(key)).decode() if store.check([key]) else ""


def _key(topic: str, rank: int) -> str:
    return f"twa-scale/{topic}/{rank}"


def connect_to_store() -> Any:
    """Return a new connection to the store of the default process group, or None; torch has no public name for it."""
    find = getattr(dist.distributed_c10d, "_get_default_store", None)
    store: Any = find() if find is not None else None
    return store.clone() if hasattr(store, "clone") else store
