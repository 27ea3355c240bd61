"""A failure on one rank raises the same error on all ranks. No rank waits, and no partial output remains."""

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import twa_scale
from tests.pool import Pool
from twa_scale.errors import CandidateError, OutputError

ENGINES = ["plain", "ddp", "fsdp2"]


def make(engine: str) -> nn.Module:
    model = nn.Sequential(nn.Linear(40, 50), nn.Linear(50, 41))
    match engine:
        case "ddp":
            return DistributedDataParallel(model)
        case "fsdp2":
            fully_shard(model)
    return model


def states(n: int = 3) -> list[dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    return [make("plain").state_dict() for _ in range(n)]


def sharded(root: Path) -> list[Path]:
    """Return candidates that consist of several files with an index."""
    for i, state in enumerate(states()):
        model = make("plain")
        model.load_state_dict(state)
        twa_scale.Snapshots(root, every_n_steps=1, max_shard_size="9kB").save(model, i)
    return sorted(root.glob("step-*"))


def attach(engine: str, paths: list[Path]) -> None:
    twa_scale.attach(make(engine), candidates=[str(path) for path in paths])


def files_of(candidate: Path) -> list[Path]:
    return sorted(candidate.glob("*.safetensors"))


def cut(candidate: Path) -> str:
    file = files_of(candidate)[-1]
    file.write_bytes(file.read_bytes()[:-40])
    return file.name


def overwrite_with_random_bytes(candidate: Path) -> str:
    file = files_of(candidate)[-1]
    content = bytearray(file.read_bytes())
    content[8:20] = b"\xff" * 12
    file.write_bytes(content)
    return file.name


def remove(candidate: Path) -> str:
    file = files_of(candidate)[-1]
    file.unlink()
    return file.name


def garble_index(candidate: Path) -> str:
    (candidate / "model.safetensors.index.json").write_text('{"weight_map": {')
    return "model.safetensors.index.json"


@pytest.mark.parametrize("damage", [cut, overwrite_with_random_bytes, remove, garble_index])
@pytest.mark.parametrize(("engine", "size"), [("ddp", 2), ("fsdp2", 3)])
def test_a_shard_that_is_damaged(
    ranks: Pool, tmp_path: Path, damage: Callable[[Path], str], engine: str, size: int
) -> None:
    paths = sharded(tmp_path)
    assert len(files_of(paths[1])) > 1
    name = damage(paths[1])
    error = ranks.error(attach, size, engine=engine, paths=paths)
    assert isinstance(error, CandidateError) and name in str(error) and paths[1].name in str(error)


# Between opening and reading


def attach_meanwhile(engine: str, paths: list[Path], damage: str) -> dict[str, Any] | None:
    """Rank 0 damages the last candidate after all ranks have opened it."""
    from twa_scale.average.layout import match

    def damage_then_match(*arguments: Any) -> Any:
        dist.barrier()
        if dist.get_rank() == 0:
            match damage:
                case "truncate":
                    os.truncate(paths[-1], paths[-1].stat().st_size - 600)
                case "remove":
                    paths[-1].unlink()
        dist.barrier()
        return match_(*arguments)

    match_ = match
    with patch("twa_scale.average.attach.match", damage_then_match):
        model = make(engine)
        twa_scale.attach(model, candidates=[str(path) for path in paths])
    return None


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_a_file_that_changes_after_it_was_opened(ranks: Pool, tmp_path: Path, suffix: str, engine: str) -> None:
    paths = save(tmp_path, suffix)
    error = ranks.error(attach_meanwhile, 3, engine=engine, paths=paths, damage="truncate")
    assert isinstance(error, CandidateError) and paths[-1].name in str(error) and "tensor '" in str(error)


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_a_file_that_was_opened_may_lose_its_name(ranks: Pool, tmp_path: Path, suffix: str, engine: str) -> None:
    """A writer that keeps the last candidates may delete one while it is read."""
    ranks(attach_meanwhile, 3, engine=engine, paths=save(tmp_path, suffix), damage="remove")


def save(root: Path, suffix: str) -> list[Path]:
    from safetensors.torch import save_file

    paths = [root / f"step-{i}.{suffix}" for i in range(3)]
    for path, state in zip(paths, states(), strict=True):
        save_file(state, path) if suffix == "safetensors" else torch.save(state, path)
    return paths


# While exporting


@contextmanager
def full_disk(rank: int) -> Iterator[None]:
    """Fill the disk of one rank."""

    def pwrite(*_: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with patch("os.pwrite", pwrite if dist.get_rank() == rank else os.pwrite):
        yield


def export_to_a_full_disk(engine: str, out: Path, rank: int) -> None:
    twa = twa_scale.attach(make(engine), candidates=states())
    twa.export(out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    with full_disk(rank):
        try:
            twa.export(out, overwrite=True)
        finally:
            dist.barrier()
            assert {path.name: path.read_bytes() for path in out.iterdir()} == before
            assert list(out.parent.iterdir()) == [out]


@pytest.mark.parametrize(
    ("engine", "rank"), [("fsdp2", 0), ("fsdp2", 2), pytest.param("ddp", 1, marks=pytest.mark.slow), ("plain", 0)]
)
def test_a_disk_that_is_full_on_one_rank(ranks: Pool, tmp_path: Path, engine: str, rank: int) -> None:
    """Existing files are kept, and no temporary directory remains."""
    error = ranks.error(export_to_a_full_disk, 3, engine=engine, out=tmp_path / "out", rank=rank)
    assert isinstance(error, OutputError) and os.strerror(errno.ENOSPC) in str(error) and "out" in str(error)
    assert load_file(tmp_path / "out/model.safetensors").keys() == states()[0].keys()


def export_twice(engine: str, bad: Path, good: Path) -> str:
    """After a failed export the average can be exported again."""
    twa = twa_scale.attach(make(engine), candidates=states())
    message = ""
    try:
        twa.export(bad)
    except OutputError as error:
        message = str(error)
    twa.export(good)
    return message


@pytest.mark.parametrize("engine", ENGINES)
def test_an_output_that_cannot_be_made(ranks: Pool, tmp_path: Path, engine: str) -> None:
    (tmp_path / "file").write_text("mine")
    messages = ranks(export_twice, 2, engine=engine, bad=tmp_path / "file/out", good=tmp_path / "good")
    assert len(set(messages)) == 1 and "file/out" in messages[0]
    mean = {name: torch.stack([s[name] for s in states()]).mean(0) for name in states()[0]}
    actual = load_file(tmp_path / "good/model.safetensors")
    assert all(torch.allclose(actual[name], value, atol=1e-6) for name, value in mean.items())
