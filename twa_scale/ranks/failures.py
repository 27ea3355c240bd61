"""Who is missing when ranks wait in vain: signs of life and last words, in the store through which the ranks met."""

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
_BEATS = 20  # signs of life within a time-out
_FASTEST, _SLOWEST = 0.2, 5.0  # seconds between two of them
_BROKEN = ("gloo", "NCCL", "caused pair closure")  # what such an error says, of which some have no type of their own
_HOLDER = "rank 0, whose process or launcher holds the store of all ranks"
_PATIENCE = 5.0  # seconds that ranks without signs of life have, to say that they wait too


class Presence:
    """A thread that tells the other ranks, as long as this process runs, that it does: in a `with` block.

    A frozen process, or one whose node is gone, gives no sign. Nobody looks for signs until a collective has failed.
    """

    def __init__(self, timeout: float) -> None:
        self._interval = min(max(timeout / _BEATS, _FASTEST), _SLOWEST)
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, name="twa-scale-presence", daemon=True)

    def __enter__(self) -> None:
        self._store = own_store()
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join(1.0)  # no longer: a store that is frozen keeps it for ever

    def _run(self) -> None:
        who = f"{socket.gethostname()}, process {os.getpid()}"
        beat = 0
        with suppress(Exception):  # the store has ended, and with it the run
            while self._store is not None and not self._done.is_set():
                self._store.set(_key("sign", dist.get_rank()), f"{self._interval}\n{who}\n{beat}")
                beat += 1
                self._done.wait(self._interval)


@contextmanager
def last_words() -> Iterator[None]:
    """Leave word in the store of an error that leaves the body: ranks that wait for this one then say why."""
    try:
        yield
    except BaseException as error:
        if not (isinstance(error, RankError) or getattr(error, "agreed", False) or is_broken(error)):
            _say("failed", f"{type(error).__name__}: {error}" if str(error) else type(error).__name__)
        raise


@contextmanager
def waiting(group: dist.ProcessGroup | None = None) -> Iterator[None]:
    """Turn the failure of a collective in the body into an error that names who is missing.

    Args:
        group: the ranks that take part; all when not given.

    Raises:
        RankError: a rank ended, failed, froze, or did not come within the time-out.
    """
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, RankError) or not is_broken(error):
            raise
        raise RankError(_explained(error, group)) from error


def is_broken(error: BaseException) -> bool:
    """Return whether an error says that ranks do not reach each other. Gloo raises no type of its own."""
    if isinstance(error, dist.DistError | RankError):
        return True
    return isinstance(error, RuntimeError) and any(name in str(error) for name in _BROKEN)


def _explained(error: RuntimeError, group: dist.ProcessGroup | None) -> str:
    """Return what the others left in the store."""
    me = dist.get_rank()
    others = [rank for rank in dist.get_process_group_ranks(group) if rank != me]
    found = answer(lambda: _found(others), 5 * _PATIENCE) or f"{_HOLDER}, does not answer"
    why = re.sub(r"^\[[^]]*\] ", "", str(error).strip().splitlines()[0])  # without where in gloo's sources
    return f"rank {me} waited in vain: {found}. ({why.partition('. ')[0]})"


def _found(others: Sequence[int]) -> str:
    try:
        store = own_store()
    except Exception:  # nobody accepts a new connection
        return f"{_HOLDER}, does not answer"
    if store is None:
        return "some of the other ranks did not come"
    with suppress(Exception):
        found = _looked_for(others, store)
        store.set(_key("knows", dist.get_rank()), "")
        if dist.get_rank() == 0:  # its process may hold the store, and others look a little later
            deadline = time.monotonic() + _PATIENCE
            late = [rank for rank in others if not _read(store, "failed", rank)]
            while late and time.monotonic() < deadline:
                time.sleep(_FASTEST)
                late = [rank for rank in late if not store.check([_key("knows", rank)])]
        return found
    return f"{_HOLDER}, has ended"


def _looked_for(others: Sequence[int], store: Any) -> str:
    """Say that this rank waits, give the others a moment to say so too, and return who did not, and why."""
    store.set(_key("waits", dist.get_rank()), "")
    before = {rank: _read(store, "sign", rank) for rank in others}
    signs = {rank: sign.splitlines() for rank, sign in before.items() if sign}
    slowest = max((float(sign[0]) for sign in signs.values()), default=_PATIENCE / 3)
    deadline = time.monotonic() + 3 * slowest
    while time.monotonic() < deadline:
        failed = {rank: word for rank in others if (word := _read(store, "failed", rank))}
        if failed:
            return "; ".join(f"rank {rank} failed ({word})" for rank, word in failed.items())
        if all(store.check([_key("waits", rank)]) for rank in others):
            return "no rank is missing: the network between them failed, or they take part in different collectives"
        time.sleep(slowest / 5)
    silent = [rank for rank in signs if _read(store, "sign", rank) == before[rank]]
    if silent:
        named = ", ".join(f"rank {rank} ({signs[rank][1]})" for rank in silent)
        return f"{named} gives no sign of life: frozen, or its process or node is gone"
    named = " and ".join(f"rank {rank}" for rank in others if not store.check([_key("waits", rank)]))
    return f"{named} did not come: busy elsewhere, frozen or gone. Look at its log; `timeout` says how long ranks wait"


def _say(what: str, text: str) -> None:
    if not (dist.is_available() and dist.is_initialized()):
        return

    def tell() -> None:
        store = own_store()
        if store is not None:
            store.set(_key(what, dist.get_rank()), text)

    answer(tell, _PATIENCE)


def answer(ask: Callable[[], T], seconds: float = _PATIENCE) -> T | None:
    """Return what `ask` returns; None where it raises or takes longer, as with a store that is frozen itself."""
    found: list[T] = []

    def run() -> None:
        with suppress(Exception):
            found.append(ask())

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    return found[0] if found else None


def _read(store: Any, what: str, rank: int) -> str:
    key = _key(what, rank)
    return bytes(store.get(key)).decode() if store.check([key]) else ""


def _key(what: str, rank: int) -> str:
    return f"twa-scale/{what}/{rank}"


def own_store() -> Any:
    """Return a connection of its own to the store of the process group, or None; torch has no public name for it."""
    find = getattr(dist.distributed_c10d, "_get_default_store", None)
    store: Any = find() if find is not None else None
    return store.clone() if hasattr(store, "clone") else store
