"""The bytes sent in a step: between pods only the gradient of the coefficients, inside a pod the bytes of `plan`."""

import os
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import twa_scale
from tests import traffic
from tests.commands.small_runs import settings, train_candidates
from tests.grid import rest_slow
from tests.pool import Pool
from tests.traffic import Call
from twa_scale.config import RunConfig, validated
from twa_scale.ranks import World
from twa_scale.run.loop import Run
from twa_scale.run.progress import Report
from twa_scale.run.tasks.byte_gpt import ByteGPT
from twa_scale.run.tasks.causal_lm import ByteGPTSizes
from twa_scale.tools.planning import make_plan

PODS = (range(0, 2), range(2, 4))
SIZES = ByteGPTSizes(n_layer=2, n_head=2, d_model=32)  # equal rows, so that two ranks need no padding
N, CONTEXT = 3, 16


def model() -> ByteGPT:
    torch.manual_seed(0)
    return ByteGPT(CONTEXT, SIZES.n_layer, SIZES.n_head, SIZES.d_model)


def step(engine: str, store: str) -> tuple[list[Call], int]:
    """Return what the third step sent, and the number of groups. DDP rebuilds its buckets in the first."""
    traffic.count_from_here(store)
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pods", "ranks"))
    net = model()
    stored: nn.Module = net
    if engine == "fsdp2":
        for block in net.blocks:
            fully_shard(block, mesh=mesh["ranks"])
        fully_shard(net, mesh=mesh["ranks"])
    else:
        stored = DistributedDataParallel(net, process_group=mesh.get_group("ranks"))
    states = [{name: value + 0.01 * i for name, value in model().state_dict().items()} for i in range(N)]
    twa = twa_scale.attach(stored, states, {"groups": "block"}, replica_group=mesh.get_group("pods"))
    for _ in range(3):
        traffic.calls.clear()
        stored(torch.randint(256, (2, CONTEXT))).square().mean().backward()
        twa.step()
        twa.zero_grad()
    return list(traffic.calls), len(twa.layout.groups)


@pytest.mark.parametrize("engine", ["fsdp2", "ddp"])
def test_only_coefficient_gradients_are_sent_between_pods(ranks: Pool, tmp_path: Path, engine: str) -> None:
    results = ranks(step, 4, engine=engine, store=str(tmp_path / "store"))
    weights = 4 * sum(p.numel() for p in model().parameters())
    blocks = 4 * sum(p.numel() for p in model().blocks.parameters())
    for rank, (calls, groups) in enumerate(results):
        numbers = 8 * (N + 1) * groups
        outer = [call for call in calls if not call.stays_in(*PODS)]
        assert outer == ([Call("allreduce", (0, 2), numbers)] if rank in (0, 2) else [])
        inner: dict[str, list[int]] = {}
        for call in calls:
            if call.stays_in(*PODS):
                inner.setdefault(call.name, []).append(call.nbytes)
        gathered = sum(inner.pop("all_gather_single"))
        reduced = inner.pop("allreduce")
        assert reduced.pop() == numbers and inner.pop("broadcast") == [numbers]  # the sum of the pod, and that of all
        if engine == "fsdp2":
            assert sum(inner.pop("reduce_scatter_single")) == weights
            assert (
                gathered == weights + blocks
            )  # blocks in forward and in backward; the root remains gathered between them
            assert not reduced
        else:
            assert sum(reduced) == weights and gathered == weights
        assert not inner


def step_of_a_run(data: dict[str, Any], store: str) -> list[Call]:
    """Return what the third step of `twa-scale run` sent."""
    traffic.count_from_here(store)
    rank = dist.get_rank()
    with patch.dict(os.environ, {"RANK": str(rank), "WORLD_SIZE": "4", "LOCAL_RANK": str(rank)}):
        world = World.from_environment()
    run = Run(validated(RunConfig, data), world, torch.device("cpu"), Report(active=False))
    run._attach(run._find_on_first_rank()[1])
    for number in range(3):
        traffic.calls.clear()
        run.take_step(number, number)
    return list(traffic.calls)


@pytest.mark.parametrize(
    ("engine", "rows"),
    rest_slow(
        [("fsdp2", None), ("ddp", None), ("fsdp2", "float32"), ("fsdp2", "int8")],
        lambda engine, rows: rows == ("int8" if engine == "fsdp2" else None),
    ),
)
def test_sent_bytes_equal_those_of_plan(ranks: Pool, tmp_path: Path, engine: str, rows: str | None) -> None:
    task = {"name": "causal_lm", "model": {"byte_gpt": SIZES.model_dump()}, "context": CONTEXT}
    task["text"] = {"train": [__file__], "validation": [traffic.__file__]}
    candidates = train_candidates(task, tmp_path / "candidates", steps=3, every=1)
    data = settings(candidates, task, tmp_path / "run", engine=engine, pods=2, batch_size=8)
    if rows:
        data |= {"groups": "tensor+row", "row_exchange": rows}
    plan = make_plan(validated(RunConfig, data), 4)
    results = ranks(step_of_a_run, 4, data=data, store=str(tmp_path / "store"))
    for rank, calls in enumerate(results):
        outer = [call for call in calls if not call.stays_in(*PODS)]
        assert sum(call.sent for call in calls if call.stays_in(*PODS)) == sum(plan.wire.values())
        between = dict(plan.wire_between_pods)
        of_rows = between.pop("corrections of rows, from every rank", 0)
        assert sum(call.sent for call in outer) == of_rows + (sum(between.values()) if rank in (0, 2) else 0)
        assert list(between.values()) == [8 * (plan.num_candidates + 1) * plan.num_groups, 16, *[16] * bool(rows)]
        assert bool(of_rows) == bool(rows)
