"""Coefficients and exported weights of every sharding library, compared with training of a plain model on a CPU."""

import os
from collections.abc import Iterator
from pathlib import Path
from tempfile import mkdtemp
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import twa_scale
from tests import zero
from tests.gpu.stages.alone import alone
from tests.gpu.stages.setup import Row, Setup

KINDS = ("fsdp2", "fsdp1", "ddp", "zero1", "zero2", "zero3", "fairscale")
N, STEPS, TOLERANCE = 4, 5, 1e-4
CONFIG = {"groups": "tensor", "optimizer": {"name": "adamw", "lr": 0.1}}

Trained = dict[str, Tensor]
"""The exported weights by name, and the coefficients under ""."""


def run(setup: Setup) -> Iterator[Row]:
    with mock.patch.dict(os.environ), alone(setup):  # DeepSpeed reads ranks there
        yield from compared(setup.device, setup.scratch, reference(setup.scratch))


def compared(device: torch.device, scratch: Path, want: Trained) -> Iterator[Row]:
    """Train with every library in the present process group."""
    for kind in KINDS:
        label = f"{kind}, {dist.get_world_size()} rank{'s' * (dist.get_world_size() > 1)}"
        if kind == "fairscale" and device.type == "cpu":
            yield Row(label, "its forward pass needs a GPU")
            continue
        try:
            actual = trained(wrap(build().to(device), kind), device, scratch)
        except Exception as error:  # a failure of one library does not stop the others
            first_line = str(error).strip().partition("\n")[0]
            yield Row(label, f"{type(error).__name__}: {first_line[:150]}", ok=False)
            continue
        error_of = {name: float((actual[name] - value).norm() / value.norm()) for name, value in want.items()}
        worst = max(error_of, key=lambda name: error_of[name])
        measured = f"{error_of[worst]:.1e} ({worst or 'coefficients'})"
        yield Row(label, measured, f"error up to {TOLERANCE:.0e}", error_of[worst] <= TOLERANCE)


def reference(scratch: Path) -> Trained:
    return trained(build(), torch.device("cpu"), scratch)


def build() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Sequential(nn.Linear(64, 64), nn.Tanh()), nn.Linear(64, 1))


def candidates() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    base = build().state_dict()
    return [{k: v + 0.05 * torch.randn(v.shape, generator=generator) for k, v in base.items()} for _ in range(N)]


def wrap(model: Any, kind: str) -> Any:
    """Wrap the model with a library, with nested units."""
    device = next(model.parameters()).device
    match kind:
        case "fsdp2":
            mesh = init_device_mesh(device.type, (dist.get_world_size(),))
            return fully_shard(fully_shard(model[2], mesh=mesh) and model, mesh=mesh)
        case "fsdp1":
            options: dict[str, Any] = {"device_id": device, "use_orig_params": True}
            model[2] = FullyShardedDataParallel(model[2], **options)
            return FullyShardedDataParallel(model, **options)
        case "ddp":
            return DistributedDataParallel(model)
        case "fairscale":
            from fairscale.nn.data_parallel import FullyShardedDataParallel as FairscaleFSDP

            group = {"process_group": dist.group.WORLD, "process_group_reduce_scatter": dist.group.WORLD}
            model[2] = FairscaleFSDP(model[2], **group)
            return FairscaleFSDP(model, **group)
    return zero.wrap(model, kind)


def trained(model: Any, device: torch.device, scratch: Path) -> Trained:
    """Attach and take some steps. All ranks see the same batches. Collective if the model is sharded."""
    twa = twa_scale.attach(model, candidates(), CONFIG)
    generator = torch.Generator().manual_seed(2)
    for _ in range(STEPS):
        x, y = torch.randn(16, 32, generator=generator), torch.randn(16, 1, generator=generator)
        loss = F.mse_loss(model(x.to(device)), y.to(device))
        model.backward(loss) if hasattr(model, "backward") else loss.backward()
        twa.step()
        twa.zero_grad()
    path = [mkdtemp(dir=scratch)]
    if dist.is_initialized():
        dist.broadcast_object_list(path, 0)
    twa.export(path[0], overwrite=True)
    coefficients = twa.coefficients.cpu()
    twa.close()
    return {"": coefficients, **load_file(Path(path[0]) / "model.safetensors")}
