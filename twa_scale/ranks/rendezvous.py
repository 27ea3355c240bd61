"""Rendezvous without a preset port: rank 0 opens a store on a free port and publishes its address."""

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

from torch.distributed import Store, TCPStore

from twa_scale.errors import ConfigError, TwaError

_TIMEOUT = 10.0  # seconds to exchange one line


@dataclass(frozen=True)
class ServerAddress:
    """The address of rank 0's server. The token distinguishes it from a later server on the same port."""

    addresses: list[str]
    port: int
    token: str


class RendezvousServer:
    """The server of rank 0: a store on a free port, and a listener that sends this port to clients with the token."""

    def __init__(self, size: int) -> None:
        self._missing = set(range(1, size))
        self._store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False, use_libuv=_with_libuv())
        dual = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if dual else socket.AF_INET
        self._listener = socket.create_server(("", 0), family=family, dualstack_ipv6=dual, backlog=max(size, 128))
        self.address = ServerAddress(_hosts(), self._listener.getsockname()[1], secrets.token_hex(16))

    def accept_all(self, timeout: float) -> Store:
        """Wait until every other rank has connected, and return the store that they share.

        Raises:
            ConfigError: a rank did not connect within `timeout` seconds.
        """
        deadline = time.monotonic() + timeout
        with self._listener:
            while self._missing:
                self._listener.settimeout(max(deadline - time.monotonic(), 1e-3))
                try:
                    client, _ = self._listener.accept()
                except TimeoutError:
                    missing = ", ".join(map(str, sorted(self._missing)[:8])) + (
                        ", ..." if len(self._missing) > 8 else ""
                    )
                    raise ConfigError(
                        f"rank 0 waited {timeout:.0f} s for rank {missing}: did it start, and can its node reach "
                        f"{self.address.addresses[0]}? If not, set MASTER_ADDR and MASTER_PORT."
                    ) from None
                with client, suppress(OSError, ValueError):  # an unrelated client, or a rank that will retry
                    self._answer(client)
        return self._store

    def _answer(self, client: socket.socket) -> None:
        client.settimeout(1.0)  # Ranks send their token at once; an unrelated client must not delay them.
        token, rank = _line(client).split()
        if secrets.compare_digest(token, self.address.token):
            client.sendall(f"{self._store.port} {token}\n".encode())
            self._missing.discard(int(rank))


def connect(server: ServerAddress, rank: int) -> Store:
    """Connect to rank 0 through the first of its addresses that works, and return the store.

    Raises:
        OSError: no address leads to a server with the right token.
    """
    for address in server.addresses:
        with suppress(OSError, ValueError), socket.create_connection((address, server.port), _TIMEOUT) as connection:
            connection.sendall(f"{server.token} {rank}\n".encode())
            port, token = _line(connection).split()
            if token == server.token:
                return _store(address, int(port))
    raise OSError(f"rank 0 is not reachable at {', '.join(server.addresses)}, port {server.port}")


def _store(address: str, port: int) -> Store:
    limit = timedelta(seconds=_TIMEOUT)
    try:
        return TCPStore(address, port, is_master=False, wait_for_workers=False, timeout=limit, use_libuv=_with_libuv())
    except RuntimeError as error:  # Rank 0 ended after its answer.
        raise OSError(str(error)) from error


def _with_libuv() -> bool:
    """Return whether stores use libuv, as torch decides it. Builds without libuv need USE_LIBUV=0."""
    return os.environ.get("USE_LIBUV", "1") == "1"


def rendezvous_in_directory(directory: Path, job: str, rank: int, size: int, timeout: float) -> Store:
    """Connect all ranks through a file in a shared directory, and return their store.

    Rank 0 writes its address to the file, and removes it when all ranks have connected. A file of an earlier job is
    ignored, because its server has ended or has another token.

    Args:
        directory: a directory that all ranks share; created if needed.
        job: a name that is unique to this launch. It is part of the file's name.
        rank: the rank of this process.
        size: the number of ranks.
        timeout: seconds to wait for the other ranks.

    Raises:
        ConfigError: the directory cannot be used, or ranks did not connect within `timeout`.
    """
    path = directory / f".meeting-{job}.json"
    try:
        directory.mkdir(parents=True, exist_ok=True)  # Every rank tries, so that a bad path fails on all of them.
        if rank == 0:
            return _serve(path, RendezvousServer(size), timeout)
    except OSError as error:
        raise ConfigError(f"{directory}: the ranks cannot use it for their rendezvous: {error}.") from error
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        with suppress(OSError, ValueError, TypeError):  # no file yet, or one of an earlier job
            return connect(ServerAddress(**json.loads(path.read_text())), rank)
        time.sleep(0.1)
    raise ConfigError(
        f"rank {rank} waited {timeout:.0f} s for rank 0 to write its address to {directory}: did rank 0 start, and do "
        "all nodes share this directory? If they do not, use one that they share, or set MASTER_ADDR and MASTER_PORT."
    )


def rendezvous_over_mpi(communicator: Any, timeout: float) -> Store:
    """Connect all ranks after rank 0 has broadcast its address over an MPI communicator, and return their store.

    Raises:
        TwaError: the node of this rank cannot reach that of rank 0. Raised on this rank only.
        ConfigError: other ranks did not connect within `timeout` seconds. Raised on rank 0 only.
    """
    if communicator.rank == 0:
        server = RendezvousServer(communicator.size)
        communicator.bcast(server.address)
        return server.accept_all(timeout)
    try:
        return connect(communicator.bcast(None), communicator.rank)
    except OSError as error:
        raise TwaError(f"{error}, from {socket.gethostname()}. Set MASTER_ADDR and MASTER_PORT.") from error


def _serve(path: Path, server: RendezvousServer, timeout: float) -> Store:
    partial = path.with_suffix(".part")
    try:
        partial.write_text(json.dumps(asdict(server.address)))
        os.replace(partial, path)
        return server.accept_all(timeout)
    finally:
        partial.unlink(missing_ok=True)
        path.unlink(missing_ok=True)


def _line(connection: socket.socket) -> str:
    with connection.makefile("r") as text:
        return text.readline(256)


def _hosts() -> list[str]:
    """Return names and addresses of this host, best first: its name, its outgoing addresses, and localhost."""
    names = [socket.gethostname()]
    # Addresses reserved for documentation. Connecting a datagram socket sends nothing.
    for family, remote in ((socket.AF_INET, "192.0.2.1"), (socket.AF_INET6, "2001:db8::1")):
        with suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((remote, 9))
            names.append(probe.getsockname()[0])
    return [*dict.fromkeys(names), "localhost"]
