"""One rank of the comparison: trains coefficients in pods, under DDP, or alone on the batches of all ranks."""

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from link import DEVICE
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import twa_scale
from twa_scale.config import TaskConfig
from twa_scale.ranks import exit_process
from twa_scale.ranks.destroying import destroy_process_group
from twa_scale.run.batches import make_batches
from twa_scale.run.tasks import build_task
from twa_scale.run.tasks.byte_gpt import ByteGPT

SIZES: dict[str, Any] = {"n_layer": 7, "n_head": 8, "d_model": 512}
CONTEXT = 64
TASK = {"name": "causal_lm", "model": {"byte_gpt": SIZES}, "text": "stdlib", "context": CONTEXT}
TWA = {"groups": "block", "optimizer": {"name": "adamw", "lr": 0.03}}


def main() -> None:
    """Take the steps, and write what each cost and the weights at the end."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("mode", choices=["pods", "ddp", "alone"])
    parser.add_argument("--candidates", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--ranks", type=int, required=True, help="of the compared runs: the parts of a batch")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if size > 1:
        dist.init_process_group("gloo")
    task = build_task(TaskConfig.model_validate(TASK))
    model, replica_group = held(arguments.mode, size)
    twa = twa_scale.attach(model, arguments.candidates, TWA, replica_group=replica_group)
    examples = task.dataset("train")
    batches = make_batches(examples, "train", 2 * arguments.ranks, 2, rank, size, seed=0)
    costs = []
    for step in range(arguments.steps):
        start, before = time.perf_counter(), counters()
        for batch in batches.training(step):
            (task.loss(model, batch) / batches.num_micro).backward()
        twa.step()
        twa.zero_grad()
        seconds = time.perf_counter() - start
        costs.append({"seconds": seconds} | {key: value - before[key] for key, value in counters().items()})
    twa.export(arguments.out, dtype=torch.float32)
    if rank == 0:
        numbers = 8 * (twa.num_candidates + 1) * len(twa.layout.groups)
        parameters = sum(p.numel() for p in ByteGPT(context=CONTEXT, **SIZES).parameters())
        known = {"parameters": parameters, "coefficient_bytes": numbers, "steps": costs}
        (arguments.out / "cost.json").write_text(json.dumps(known))
    if size > 1:
        destroy_process_group()


def held(mode: str, size: int) -> tuple[nn.Module, dist.ProcessGroup | None]:
    """Return the model as the mode holds it, and the replica group: with pods, half of the ranks are in each."""
    model = ByteGPT(context=CONTEXT, **SIZES)
    if mode == "ddp":
        return DistributedDataParallel(model), None
    if mode == "alone" or size == 2:
        return model, None  # a plain module's pod is its rank
    mesh = init_device_mesh("cpu", (2, size // 2), mesh_dim_names=("pods", "ranks"))
    for block in model.blocks:
        fully_shard(block, mesh=mesh["ranks"])
    fully_shard(model, mesh=mesh["ranks"])
    return model, mesh.get_group("pods")


def counters() -> dict[str, int]:
    """Return the bytes that this host has sent and received over the link, as its device counts them."""
    directory = Path("/sys/class/net") / DEVICE / "statistics"
    keys = {"sent": "tx_bytes", "received": "rx_bytes"}
    return {key: int((directory / file).read_text()) for key, file in keys.items()} if directory.exists() else {}


if __name__ == "__main__":
    main()
    exit_process(0)
