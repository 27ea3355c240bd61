"""Rendezvous through a shared directory, also with files of earlier jobs in it."""

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

from tests.pool import Pool
from twa_scale.errors import ConfigError
from twa_scale.ranks import World, rendezvous
from twa_scale.ranks.rendezvous import rendezvous_in_directory

JOB = "slurm-7-0-0"


def meet(directory: Path, late: int = -1, size: int = 3) -> list[dist.Store]:
    def rank(number: int) -> dist.Store:
        time.sleep(0.5 * (number == late))
        return rendezvous_in_directory(directory, JOB, number, size, timeout=20)

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(rank, range(size)))


def require_one_store(stores: list[dist.Store], directory: Path) -> None:
    stores[0].set("key", "value")
    assert all(store.get("key") == b"value" for store in stores)
    assert not list(directory.iterdir())


@pytest.mark.parametrize("late", [0, 2])
def test_ranks_connect_in_any_order_and_remove_their_file(tmp_path: Path, late: int) -> None:
    require_one_store(meet(tmp_path / "made/on/the/way", late), tmp_path / "made/on/the/way")


@contextmanager
def listening(answer: Callable[[socket.socket], object]) -> Iterator[int]:
    """Run another server on the port of an earlier job."""
    with socket.create_server(("localhost", 0)) as server:

        def serve() -> None:
            while True:
                try:
                    client, _ = server.accept()
                except OSError:
                    return
                with client:
                    answer(client)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield server.getsockname()[1]
        server.shutdown(socket.SHUT_RDWR)
        thread.join(5)


UNRELATED_SERVERS: dict[str, Callable[[socket.socket], Any]] = {
    "closes": lambda _: None,
    "echo": lambda client: client.sendall(client.recv(100)),
    "other job": lambda client: client.sendall(b"29500 of-another-job\n"),
    "web": lambda client: client.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n"),
    "silent": lambda client: time.sleep(1),
}


@pytest.mark.parametrize("server", UNRELATED_SERVERS)
def test_address_of_an_earlier_job_is_ignored(tmp_path: Path, server: str) -> None:
    with listening(UNRELATED_SERVERS[server]) as port, patch.object(rendezvous, "_TIMEOUT", 0.5):
        stale = {"addresses": ["localhost"], "port": port, "token": "of-a-dead-job"}
        (tmp_path / f".meeting-{JOB}.json").write_text(json.dumps(stale))
        require_one_store(meet(tmp_path, late=0), tmp_path)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"port": 3}', '{"addresses": 3, "port": 3, "token": 3}'])
def test_invalid_address_file_is_ignored(tmp_path: Path, content: str) -> None:
    (tmp_path / f".meeting-{JOB}.json").write_text(content)
    require_one_store(meet(tmp_path, late=0), tmp_path)


def test_clients_without_the_token_are_rejected(tmp_path: Path) -> None:
    def send_wrong_tokens() -> None:
        path = tmp_path / f".meeting-{JOB}.json"
        while not path.exists():
            time.sleep(0.01)
        port = json.loads(path.read_text())["port"]
        for line in (b"GET / HTTP/1.1\r\n", b"wrong-token 1\n", b"\n", b""):
            with socket.create_connection(("localhost", port), 5) as connection:
                connection.sendall(line)

    thread = threading.Thread(target=send_wrong_tokens)
    thread.start()
    require_one_store(meet(tmp_path, late=2), tmp_path)
    thread.join()


def test_timeout_error_names_the_directory(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="rank 1 waited 0 s") as caught:
        rendezvous_in_directory(tmp_path, JOB, 1, 2, timeout=0.3)
    assert str(tmp_path) in str(caught.value) and "MASTER_ADDR" in str(caught.value)
    with pytest.raises(ConfigError, match="rank 0 waited 0 s for rank 1: "):
        rendezvous_in_directory(tmp_path, JOB, 0, 2, timeout=0.3)
    assert not list(tmp_path.iterdir())


def test_directory_that_cannot_be_created(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for rank in (0, 1):
        with pytest.raises(ConfigError, match="file/below"):
            rendezvous_in_directory(tmp_path / "file/below", JOB, rank, 2, timeout=20)


def in_a_group(directory: Path) -> float:
    """Sum over the group that `World.joined` creates instead of the group of the pool."""
    rank, size = dist.get_rank(), dist.get_world_size()
    dist.destroy_process_group()
    try:
        with World(rank, size, rank, "slurm", JOB).joined(torch.device("cpu"), directory):
            total = torch.tensor(rank + 1.0)
            dist.all_reduce(total)
    finally:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # the pool destroys it
    return total.item()


def test_the_process_group_works(ranks: Pool, tmp_path: Path) -> None:
    assert ranks(in_a_group, 3, directory=tmp_path) == [6.0] * 3
    assert not list(tmp_path.iterdir())


def test_unknown_address_of_rank_0(tmp_path: Path) -> None:
    with (
        pytest.raises(ConfigError, match="MASTER_ADDR"),
        World(0, 2, 0, "torchrun").joined(torch.device("cpu"), tmp_path),
    ):
        pass
