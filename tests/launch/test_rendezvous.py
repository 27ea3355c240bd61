"""Ranks find each other through a directory, whatever dead jobs have left in it."""

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
from twa_scale.ranks.rendezvous import meet_in

JOB = "slurm-7-0-0"


def meet(directory: Path, late: int = -1, size: int = 3) -> list[dist.Store]:
    def rank(number: int) -> dist.Store:
        time.sleep(0.5 * (number == late))
        return meet_in(directory, JOB, number, size, timeout=20)

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(rank, range(size)))


def require_one_store(stores: list[dist.Store], directory: Path) -> None:
    stores[0].set("key", "value")
    assert all(store.get("key") == b"value" for store in stores)
    assert not list(directory.iterdir())


@pytest.mark.parametrize("late", [0, 2])
def test_they_meet_whoever_comes_last_and_leave_nothing(tmp_path: Path, late: int) -> None:
    require_one_store(meet(tmp_path / "made/on/the/way", late), tmp_path / "made/on/the/way")


@contextmanager
def listening(answer: Callable[[socket.socket], object]) -> Iterator[int]:
    """Somebody else on a port that a dead job once had."""
    with socket.create_server(("localhost", 0)) as server:

        def serve() -> None:
            while True:
                try:
                    caller, _ = server.accept()
                except OSError:
                    return
                with caller:
                    answer(caller)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield server.getsockname()[1]
        server.shutdown(socket.SHUT_RDWR)
        thread.join(5)


STRANGERS: dict[str, Callable[[socket.socket], Any]] = {
    "nobody": lambda _: None,
    "echo": lambda caller: caller.sendall(caller.recv(100)),
    "other": lambda caller: caller.sendall(b"29500 of-another-job\n"),
    "web": lambda caller: caller.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n"),
    "silent": lambda caller: time.sleep(1),
}


@pytest.mark.parametrize("stranger", STRANGERS)
def test_a_dead_jobs_word_misleads_nobody(tmp_path: Path, stranger: str) -> None:
    with listening(STRANGERS[stranger]) as port, patch.object(rendezvous, "_PATIENCE", 0.5):
        stale = {"addresses": ["localhost"], "port": port, "token": "of-a-dead-job"}
        (tmp_path / f".meeting-{JOB}.json").write_text(json.dumps(stale))
        require_one_store(meet(tmp_path, late=0), tmp_path)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"port": 3}', '{"addresses": 3, "port": 3, "token": 3}'])
def test_nor_does_what_is_no_word_at_all(tmp_path: Path, content: str) -> None:
    (tmp_path / f".meeting-{JOB}.json").write_text(content)
    require_one_store(meet(tmp_path, late=0), tmp_path)


def test_a_stranger_at_the_door_is_sent_away(tmp_path: Path) -> None:
    def intrude() -> None:
        path = tmp_path / f".meeting-{JOB}.json"
        while not path.exists():
            time.sleep(0.01)
        port = json.loads(path.read_text())["port"]
        for line in (b"GET / HTTP/1.1\r\n", b"wrong-token 1\n", b"\n", b""):
            with socket.create_connection(("localhost", port), 5) as door:
                door.sendall(line)

    thread = threading.Thread(target=intrude)
    thread.start()
    require_one_store(meet(tmp_path, late=2), tmp_path)
    thread.join()


def test_waiting_ends_with_the_directory_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="rank 1 waited 0 s") as caught:
        meet_in(tmp_path, JOB, 1, 2, timeout=0.3)
    assert str(tmp_path) in str(caught.value) and "MASTER_ADDR" in str(caught.value)
    with pytest.raises(ConfigError, match="rank 0 waited 0 s for rank 1: "):
        meet_in(tmp_path, JOB, 0, 2, timeout=0.3)
    assert not list(tmp_path.iterdir())


def test_a_directory_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for rank in (0, 1):
        with pytest.raises(ConfigError, match="file/below"):
            meet_in(tmp_path / "file/below", JOB, rank, 2, timeout=20)


def in_a_group(directory: Path) -> float:
    """What `joined` makes, in place of the pool's own group."""
    rank, size = dist.get_rank(), dist.get_world_size()
    dist.destroy_process_group()
    try:
        with World(rank, size, rank, "slurm", JOB).joined(torch.device("cpu"), directory):
            total = torch.tensor(rank + 1.0)
            dist.all_reduce(total)
    finally:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # for the pool to take down
    return total.item()


def test_the_process_group_works(ranks: Pool, tmp_path: Path) -> None:
    assert ranks(in_a_group, 3, directory=tmp_path) == [6.0] * 3
    assert not list(tmp_path.iterdir())


def test_nothing_says_where_rank_0_is(tmp_path: Path) -> None:
    with (
        pytest.raises(ConfigError, match="MASTER_ADDR"),
        World(0, 2, 0, "torchrun").joined(torch.device("cpu"), tmp_path),
    ):
        pass
