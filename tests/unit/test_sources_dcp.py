"""Checkpoints of torch.distributed.checkpoint, written by real ranks from FSDP1, FSDP2, meshes and plain models."""

import importlib.util
import itertools
import pickle
import random
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, ShardedStateDictConfig, StateDictType
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from tests import models
from tests.old_torch import ALONE
from tests.pool import Pool
from tests.slices import opened, read, refused
from twa_scale.candidates import open_candidates
from twa_scale.candidates.formats.boxes import Box, BoxTensor, count_before, scatter
from twa_scale.errors import CandidateError

Tensors = dict[str, torch.Tensor]
NOT_IN_SAFETENSORS = ("empty", "count", "scalar")  # DCP's own consolidation fails for them, or writes zeros

HF_STORAGE = "torch.distributed.checkpoint.hf_storage"
HF_FOLDERS = {"hf": {"enable_consolidation": True}, "hf-shards": {"enable_consolidation": False}}
"""What DCP writes as safetensors, and how."""
if not importlib.util.find_spec(HF_STORAGE):  # torch 2.6 does not support this
    HF_FOLDERS = {}


def assert_holds(path: Path, expected: Tensors) -> None:
    candidate = opened(path)
    generator = random.Random(0)
    assert candidate.names() == sorted(expected)
    total = 0
    for name, wanted in expected.items():
        assert (candidate.shape(name), candidate.dtype(name)) == (tuple(wanted.shape), wanted.dtype)
        n = wanted.numel()
        parts = [sorted(generator.choices(range(n + 1), k=2)) for _ in range(8)]
        for start, stop in [(0, n), (0, 0), (n, n), *parts]:
            actual = read(candidate, name, start, stop)
            assert torch.equal(actual, wanted.reshape(-1)[start:stop]), (name, start, stop)
            total += actual.nbytes
    assert candidate.bytes_read == total
    candidate.close()


# Boxes


@given(st.data())
def test_boxes_of_any_shape(data: st.DataObject) -> None:
    shape = tuple(data.draw(st.lists(st.integers(1, 4), max_size=4)))
    starts = tuple(data.draw(st.integers(0, size - 1)) for size in shape)
    sizes = tuple(data.draw(st.integers(1, size - start)) for size, start in zip(shape, starts, strict=True))
    tensor = torch.arange(torch.Size(shape).numel()).view(shape)
    inner = torch.zeros(shape, dtype=torch.bool)
    inner[tuple(slice(a, a + n) for a, n in zip(starts, sizes, strict=True))] = True
    values, inner = tensor[inner], inner.reshape(-1)
    start = data.draw(st.integers(0, tensor.numel() - 1))
    stop = data.draw(st.integers(start + 1, tensor.numel()))
    before = count_before(shape, starts, sizes, start)
    count = count_before(shape, starts, sizes, stop) - before
    assert (before, count) == (int(inner[:start].sum()), int(inner[start:stop].sum()))
    out = torch.full((stop - start,), -1)
    if count:
        assert scatter(values[before : before + count], shape, starts, sizes, start, out) == count
    assert torch.equal(out, torch.where(inner, tensor.reshape(-1), -1)[start:stop])


# Checkpoints of real ranks


def odd() -> Tensors:
    """Layouts and types of a state dict, in sizes that no number of ranks divides."""
    generator = torch.Generator().manual_seed(0)
    made = {
        "channels_last": torch.randn(3, 5, 2, 2, generator=generator).to(memory_format=torch.channels_last),
        "transposed": torch.randn(7, 5, generator=generator).t(),
        "part": torch.randn(9, 5, generator=generator)[2:5],
        "scalar": torch.randn((), generator=generator),
        "empty": torch.empty(0, 3),
        "count": torch.tensor([7]),
        "half": torch.randn(5, 3, generator=generator).bfloat16(),
    }
    return made | {f"sharded{dim}": torch.randn(5, 7, 3, generator=generator) for dim in range(3)}


def on_mesh() -> dict[str, torch.Tensor]:
    """Return the odd tensors, some of them sharded over one or two dims of a mesh, or none."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    square = init_device_mesh("cpu", (1, dist.get_world_size()))
    state = dict(odd())
    for dim in range(3):
        name = f"sharded{dim}"
        state[name] = distribute_tensor(state[name], mesh, [Shard(dim)])
    state["half"] = distribute_tensor(state["half"], square, [Shard(0), Shard(1)])
    state["part"] = distribute_tensor(state["part"], mesh, [Replicate()])
    return state


def write(directory: Path) -> None:
    """Write every checkpoint that the tests read."""
    warnings.simplefilter("ignore")
    fsdp2 = models.wrap(models.build(0, (1,)), "fsdp2")
    optimizer = torch.optim.AdamW(fsdp2.parameters())
    for p in fsdp2.parameters():
        p.grad = torch.zeros_like(p)
    model_state, optimizer_state = get_state_dict(fsdp2, [optimizer])
    dcp.save({"app": {"model": model_state, "optim": optimizer_state}, "step": 3}, checkpoint_id=directory / "fsdp2")
    fsdp1 = FullyShardedDataParallel(models.build(0, (1,)), device_id=torch.device("cpu"), use_orig_params=True)
    with FullyShardedDataParallel.state_dict_type(
        fsdp1, StateDictType.SHARDED_STATE_DICT, ShardedStateDictConfig(_use_dtensor=False)
    ):
        dcp.save({"state_dict": fsdp1.state_dict()}, checkpoint_id=directory / "fsdp1")
    dcp.save(on_mesh(), checkpoint_id=directory / "mesh")
    contiguous = {name: value.contiguous() for name, value in on_mesh().items() if name not in NOT_IN_SAFETENSORS}
    for folder, options in HF_FOLDERS.items():
        writer = importlib.import_module(HF_STORAGE).HuggingFaceStorageWriter(
            str(directory / folder), save_distributed=True, **options
        )
        dcp.save(contiguous, storage_writer=writer)


@pytest.fixture(scope="module", params=[1, 2, 3])
def written(request: pytest.FixtureRequest, ranks: Pool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("dcp")
    ranks(write, request.param, directory=directory)
    return directory


def test_slices_equal_the_saved_tensors(written: Path, tmp_path: Path) -> None:
    model = models.build(0, (1,)).state_dict()
    assert_holds(written / "fsdp2", model)
    assert_holds(written / "fsdp1", model)
    assert_holds(written / "mesh", odd())
    stored = {name: value for name, value in odd().items() if name not in NOT_IN_SAFETENSORS}
    for folder in HF_FOLDERS:
        assert_holds(written / folder, stored)
    # as DCP itself consolidates it
    dcp_to_torch_save(written / "fsdp1", tmp_path / "whole.pt")
    assert_holds(written / "fsdp1", torch.load(tmp_path / "whole.pt")["state_dict"])


def test_nested_state_dicts(tmp_path: Path) -> None:
    state = models.build(0).state_dict()
    for i, content in enumerate(
        [state, {"model": state, "x": torch.ones(1)}, {"state_dict": state}, {"app": {"app": {"module": state}}}]
    ):
        dcp.save(content, checkpoint_id=tmp_path / f"step-{i}", **ALONE)
        assert_holds(tmp_path / f"step-{i}", state)
    assert len(open_candidates(str(tmp_path / "step-*"))) == 4
    dcp.save({"net": state}, checkpoint_id=tmp_path / "odd", **ALONE)
    assert "its keys are 'net'" in refused(tmp_path / "odd")
    dcp.save({"optim": 3}, checkpoint_id=tmp_path / "none", **ALONE)
    assert "holds no tensors" in refused(tmp_path / "none")


# Damaged


@pytest.fixture
def folder(ranks: Pool, tmp_path: Path) -> Path:
    ranks(write, 2, directory=tmp_path)
    return tmp_path


def test_damaged_checkpoints(folder: Path) -> None:
    mesh = folder / "mesh"
    chunks = mesh / "__1_0.distcp"
    content = chunks.read_bytes()
    chunks.write_bytes(content[:-700])
    assert refused(mesh).startswith(f"{chunks}: has {len(content) - 700} bytes") and "truncated" in refused(mesh)
    chunks.write_bytes(b"x" * len(content))
    assert refused(mesh).startswith(f"{chunks} at byte ") and "torch.save" in refused(mesh)
    chunks.write_bytes((folder / "fsdp2/__1_0.distcp").read_bytes() * 9)
    assert refused(mesh).startswith(str(chunks))
    chunks.unlink()
    message = refused(mesh)
    assert message.startswith(f"{mesh}: tensor ") and "'__1_0.distcp', which is not there" in message
    for raw in (b"", b"{}", (mesh / ".metadata").read_bytes()[:-50], pickle.dumps({"a": 1})):
        (mesh / ".metadata").write_bytes(raw)
        assert refused(mesh).startswith(f"{mesh / '.metadata'}: is not metadata of torch")


@pytest.mark.skipif(not HF_FOLDERS, reason="torch 2.6 does not write safetensors")
def test_damaged_safetensors(folder: Path) -> None:
    first, second = sorted((folder / "hf-shards").glob("shard-*"))
    assert f"Give the directory, {folder / 'hf-shards'}" in refused(second)
    first.unlink()
    assert "has no file shard-00001-*.safetensors" in refused(folder / "hf-shards")
    second.rename(first)
    assert "do not tile its shape" in refused(folder / "hf-shards")


class Malicious:
    def __reduce__(self) -> tuple[Callable[[str], Any], tuple[str]]:
        return exec, ("raise SystemExit('it ran')",)


def test_metadata_does_not_run_code(tmp_path: Path) -> None:
    dcp.save({"model": odd()}, checkpoint_id=tmp_path / "a", **ALONE)
    with (tmp_path / "a/.metadata").open("rb") as file:
        metadata = pickle.load(file)
    metadata.storage_meta = Malicious()
    with (tmp_path / "a/.metadata").open("wb") as file:
        pickle.dump(metadata, file)
    assert_holds(tmp_path / "a", odd())


def test_chunks_with_a_gap(tmp_path: Path) -> None:
    dcp.save({"model": odd()}, checkpoint_id=tmp_path / "a", **ALONE)
    with (tmp_path / "a/.metadata").open("rb") as file:
        metadata = pickle.load(file)
    metadata.state_dict_metadata["model.sharded0"].size = torch.Size([6, 7, 3])
    with (tmp_path / "a/.metadata").open("wb") as file:
        pickle.dump(metadata, file)
    message = refused(tmp_path / "a")
    assert message.startswith(f"{tmp_path / 'a'}: tensor 'sharded0'") and "do not tile its shape (6, 7, 3)" in message


def test_shards_of_a_rank_saved_without_dcp(ranks: Pool, tmp_path: Path) -> None:
    ranks(save_shards, 2, directory=tmp_path)
    message = refused(tmp_path / "rank-0.pt")
    assert "torch.distributed.checkpoint.save" in message and "nothing in it was run" in message, message


def save_shards(directory: Path) -> None:
    warnings.simplefilter("ignore")
    model = FullyShardedDataParallel(models.build(0, (1,)), device_id=torch.device("cpu"), use_orig_params=True)
    with FullyShardedDataParallel.state_dict_type(
        model, StateDictType.SHARDED_STATE_DICT, ShardedStateDictConfig(_use_dtensor=False)
    ):
        torch.save(model.state_dict(), directory / f"rank-{dist.get_rank()}.pt")


# Boxes that tile


def grid(shape: tuple[int, ...], cuts: list[list[int]]) -> list[Box]:
    """Return the boxes of a grid that divides every dim."""
    ends = [sorted({0, *part, size}) for part, size in zip(cuts, shape, strict=True)]
    spans = [list(itertools.pairwise(end)) for end in ends]
    return [Box(tuple(a for a, _ in cell), tuple(b - a for a, b in cell), (0,)) for cell in itertools.product(*spans)]


@given(st.data())
def test_boxes_must_cover_each_element_once(data: st.DataObject) -> None:
    """Compared with counting the elements. Moved and repeated boxes often have the right total number of elements."""
    shape = tuple(data.draw(st.lists(st.integers(1, 4), max_size=3)))
    boxes = grid(shape, [data.draw(st.lists(st.integers(0, size))) for size in shape])
    for _ in range(data.draw(st.integers(0, 2))):
        i, j = data.draw(st.integers(0, len(boxes) - 1)), data.draw(st.integers(0, len(boxes) - 1))
        boxes[i] = boxes[j]._replace(sizes=boxes[i].sizes)
    counts = torch.zeros(shape, dtype=torch.int64)
    inner = True
    for starts, sizes, _ in boxes:
        counts[tuple(slice(a, a + n) for a, n in zip(starts, sizes, strict=True))] += 1
        inner &= all(a + n <= size for a, n, size in zip(starts, sizes, shape, strict=True))
    try:
        BoxTensor(shape, torch.float32, boxes, lambda box: pytest.fail("not read"), "x")
        accepted = True
    except CandidateError:
        accepted = False
    assert accepted == (inner and bool((counts == 1).all()))


def test_boxes_with_an_overlap_and_a_gap(tmp_path: Path) -> None:
    """The total number of elements is right. The gap would contain undefined values."""
    dcp.save({"model": odd()}, checkpoint_id=tmp_path / "a", **ALONE)
    with (tmp_path / "a/.metadata").open("rb") as file:
        metadata = pickle.load(file)
    described = metadata.state_dict_metadata["model.sharded0"]
    (chunk,) = described.chunks
    parts = [((0, 0, 0), (3, 7, 3)), ((2, 0, 0), (2, 7, 3))]
    described.chunks = [type(chunk)(torch.Size(starts), torch.Size(sizes)) for starts, sizes in parts]
    (index,) = (key for key in metadata.storage_data if key.fqn == "model.sharded0")
    for starts, _ in parts:
        metadata.storage_data[type(index)("model.sharded0", torch.Size(starts))] = metadata.storage_data[index]
    with (tmp_path / "a/.metadata").open("wb") as file:
        pickle.dump(metadata, file)
    assert "do not tile its shape (5, 7, 3)" in refused(tmp_path / "a")
