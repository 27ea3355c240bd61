"""Sharded state dicts that each rank wrote with torch.save, in verl's format."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, ShardedStateDictConfig, StateDictType, fully_shard
from torch.distributed.tensor import Shard, distribute_tensor

from tests.pool import Pool
from tests.slices import opened, read, refused
from tests.specs import refused as refused_spec
from twa_scale.merge import average_fixed

KINDS = ("fsdp1", "fsdp1-mesh", "fsdp2", "hsdp")


def model() -> nn.Module:
    torch.manual_seed(0)
    made = nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Linear(7, 3))
    made.register_buffer("scale", torch.tensor([0.5, 2.0]))
    return made


def write(root: Path) -> None:
    """Write a folder for each kind, as verl's FSDPCheckpointManager does."""
    rank, size = dist.get_rank(), dist.get_world_size()
    flat = init_device_mesh("cpu", (size,), mesh_dim_names=("fsdp",))
    square = init_device_mesh("cpu", (2, size // 2), mesh_dim_names=("ddp", "fsdp"))
    for kind in (*KINDS, "columns", "two"):
        folder = root / kind / "actor"
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"model_world_size_{size}_rank_{rank}.pt"
        if kind.startswith("fsdp1"):
            mesh = flat if kind == "fsdp1-mesh" else None
            sharded = FullyShardedDataParallel(model(), device_id=torch.device("cpu"), device_mesh=mesh)
            how = ShardedStateDictConfig(offload_to_cpu=False)
            with FullyShardedDataParallel.state_dict_type(sharded, StateDictType.SHARDED_STATE_DICT, how):
                torch.save(sharded.state_dict(), path)
        elif kind in ("fsdp2", "hsdp"):
            stored = model()
            fully_shard(stored, mesh=flat if kind == "fsdp2" else square)
            torch.save(stored.state_dict(), path)
        else:
            mesh, placements = (flat, [Shard(1)]) if kind == "columns" else (square, [Shard(0), Shard(1)])
            torch.save({"w": distribute_tensor(torch.arange(35.0).view(7, 5), mesh, placements)}, path)


@pytest.fixture(scope="module")
def written(ranks: Pool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("verl")
    ranks(write, 4, root=root)
    for kind in KINDS:
        (root / kind / "actor/huggingface").mkdir()
        (root / kind / "actor/huggingface/config.json").write_text(json.dumps({"model_type": "x"}))
        torch.save({"rng": 0}, root / kind / "actor/extra_state_world_size_4_rank_0.pt")
    return root


@pytest.mark.parametrize("kind", KINDS)
def test_the_whole_model_is_read_by_slices(written: Path, kind: str) -> None:
    expected, candidate = model().state_dict(), opened(written / kind / "actor")
    assert candidate.names() == sorted(expected)
    for name, tensor in expected.items():
        flat = tensor.reshape(-1)
        assert (candidate.shape(name), candidate.dtype(name)) == (tuple(tensor.shape), tensor.dtype)
        for start, stop in ((0, len(flat)), (len(flat) // 3, len(flat) - len(flat) // 4)):
            assert torch.equal(read(candidate, name, start, stop), flat[start:stop]), name


def test_parts_of_columns(written: Path) -> None:
    candidate = opened(written / "columns/actor")
    assert torch.equal(read(candidate, "w", 3, 31), torch.arange(3.0, 31))


def test_an_average_has_the_files_of_the_folder_huggingface(written: Path, tmp_path: Path) -> None:
    average_fixed([str(written / kind / "actor") for kind in ("fsdp2", "hsdp")], tmp_path / "out")
    assert json.loads((tmp_path / "out/config.json").read_text())["model_type"] == "x"


def test_invalid_arguments_raise(written: Path, tmp_path: Path) -> None:
    assert "has the placements (Shard, Shard)" in refused(written / "two/actor")
    assert "Give the directory" in refused(written / "fsdp2/actor/model_world_size_4_rank_1.pt")
    assert "There are weights in 'actor'" in refused(written / "fsdp2")
    assert "are parts of one model" in refused_spec(str(written / "fsdp2/actor/model_*.pt"))
    gap = shutil.copytree(written / "fsdp2/actor", tmp_path / "gap")
    (gap / "model_world_size_4_rank_2.pt").unlink()
    assert "has no 'model_world_size_4_rank_2.pt', and 1 of 4 files are missing" in refused(gap)
    shutil.copy(written / "fsdp2/actor/model_world_size_4_rank_2.pt", gap / "model_world_size_8_rank_2.pt")
    assert "holds files of saves on 4 and 8 ranks" in refused(gap)
    mixed = shutil.copytree(written / "fsdp2/actor", tmp_path / "mixed")
    shutil.copy(mixed / "model_world_size_4_rank_0.pt", mixed / "model_world_size_4_rank_3.pt")
    assert "are not the shards of a mesh" in refused(mixed)
    plain = tmp_path / "plain"
    plain.mkdir()
    for rank in range(2):
        torch.save(model().state_dict(), plain / f"model_world_size_2_rank_{rank}.pt")
    assert "without distributed tensors" in refused(plain)
