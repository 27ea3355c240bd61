"""Where ranks find rank 0 without a port that is known before: it takes a free one and leaves word where."""

import json
import os
import secrets
import socket
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from torch.distributed import Store, TCPStore  # type: ignore[attr-defined]

from twa_scale.errors import ConfigError, TwaError

_PATIENCE = 10.0  # seconds for one exchange of a line


@dataclass(frozen=True)
class Offer:
    """How to reach rank 0. The token tells its door from whatever listens there when rank 0 is long gone."""

    addresses: list[str]
    port: int
    token: str


class Door:
    """Rank 0's side: a store on a free port, and a listener that tells it to those who know the token."""

    def __init__(self, size: int) -> None:
        self._waiting = set(range(1, size))
        self._store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
        dual = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if dual else socket.AF_INET
        self._listener = socket.create_server(("", 0), family=family, dualstack_ipv6=dual, backlog=max(size, 128))
        self.offer = Offer(_addresses(), self._listener.getsockname()[1], secrets.token_hex(16))

    def admit_all(self, timeout: float) -> Store:
        """Wait until every other rank has come; return the store that they share."""
        deadline = time.monotonic() + timeout
        with self._listener:
            while self._waiting:
                self._listener.settimeout(max(deadline - time.monotonic(), 1e-3))
                try:
                    caller, _ = self._listener.accept()
                except TimeoutError:
                    late = ", ".join(map(str, sorted(self._waiting)[:8])) + (", ..." if len(self._waiting) > 8 else "")
                    raise ConfigError(
                        f"rank 0 waited {timeout:.0f} s for rank {late}: did it start, and can its node reach "
                        f"{self.offer.addresses[0]}? If not, set MASTER_ADDR and MASTER_PORT."
                    ) from None
                with caller, suppress(OSError, ValueError):  # a stranger, or one that will try again
                    self._answer(caller)
        return self._store

    def _answer(self, caller: socket.socket) -> None:
        caller.settimeout(1.0)  # ranks speak at once; a stranger that says nothing must not keep them waiting
        token, rank = _line(caller).split()
        if secrets.compare_digest(token, self.offer.token):
            caller.sendall(f"{self._store.port} {token}\n".encode())
            self._waiting.discard(int(rank))


def enter(offer: Offer, rank: int) -> Store:
    """Come to rank 0's door, by whichever of its addresses leads there, and return the store.

    Raises:
        OSError: nobody is there, or somebody else.
    """
    for address in offer.addresses:
        with suppress(OSError, ValueError), socket.create_connection((address, offer.port), _PATIENCE) as door:
            door.sendall(f"{offer.token} {rank}\n".encode())
            port, token = _line(door).split()
            if token == offer.token:
                return _store(address, int(port))
    raise OSError(f"rank 0 is not reached at {', '.join(offer.addresses)}, port {offer.port}")


def _store(address: str, port: int) -> Store:
    try:
        return TCPStore(address, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=_PATIENCE))
    except RuntimeError as error:  # rank 0 ended between its answer and now
        raise OSError(str(error)) from error


def meet_in(directory: Path, job: str, rank: int, size: int, timeout: float) -> Store:
    """Meet through a file of this job's own in a directory that all ranks see; it is gone when all have come.

    What a dead job has left there misleads nobody: its door is closed, or knows another token.

    Raises:
        ConfigError: on the ranks that waited longer than `timeout` seconds.
    """
    path = directory / f".meeting-{job}.json"
    try:
        directory.mkdir(parents=True, exist_ok=True)  # every rank: a bad path fails alike everywhere
        if rank == 0:
            door = Door(size)
            return _leave_word(path, door, timeout)
    except OSError as error:
        raise ConfigError(f"{directory}: the ranks cannot meet there: {error}.") from error
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        with suppress(OSError, ValueError, TypeError):  # not there yet, or of a dead job
            return enter(Offer(**json.loads(path.read_text())), rank)
        time.sleep(0.1)
    raise ConfigError(
        f"rank {rank} waited {timeout:.0f} s for rank 0 to leave its address in {directory}: did rank 0 start, and is "
        "this a directory that all nodes share? If it is not, name one that is, or set MASTER_ADDR and MASTER_PORT."
    )


def meet_over(communicator: Any, timeout: float) -> Store:
    """Meet over an MPI communicator: rank 0 broadcasts where it is.

    Raises:
        TwaError: on ranks whose node cannot reach that of rank 0; each speaks for itself.
        ConfigError: on rank 0, when others have not come after `timeout` seconds.
    """
    if communicator.rank == 0:
        door = Door(communicator.size)
        communicator.bcast(door.offer)
        return door.admit_all(timeout)
    try:
        return enter(communicator.bcast(None), communicator.rank)
    except OSError as error:
        raise TwaError(f"{error}, from {socket.gethostname()}. Set MASTER_ADDR and MASTER_PORT.") from error


def _leave_word(path: Path, door: Door, timeout: float) -> Store:
    draft = path.with_suffix(".part")
    try:
        draft.write_text(json.dumps(asdict(door.offer)))
        os.replace(draft, path)
        return door.admit_all(timeout)
    finally:
        draft.unlink(missing_ok=True)
        path.unlink(missing_ok=True)


def _line(connection: socket.socket) -> str:
    with connection.makefile("r") as text:
        return text.readline(256)


def _addresses() -> list[str]:
    """Return how others may reach this host, best first: its name, the addresses it sends from, and from itself."""
    found = [socket.gethostname()]
    for family, anywhere in ((socket.AF_INET, "192.0.2.1"), (socket.AF_INET6, "2001:db8::1")):  # nothing is sent
        with suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((anywhere, 9))
            found.append(probe.getsockname()[0])
    return [*dict.fromkeys(found), "localhost"]
