"""The number of times that a step makes the host wait for the GPU, according to torch."""

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import twa_scale
from tests.gpu.stages.alone import alone
from tests.gpu.stages.setup import Row, Setup

WIDTH, BLOCKS, N = 256, 3, 4
SETTINGS: dict[str, dict[str, Any]] = {
    "a step": {},
    "orthonormal, group per tensor": {"basis": "orthonormal", "groups": "tensor"},
    "max_weight_grad_norm": {"max_weight_grad_norm": 1.0},
    "store_device: cpu": {"store_device": "cpu"},
}
FORWARD = {"combine: forward": {"combine": "forward"}, "both": {"combine": "forward", "store_device": "cpu"}}


def build(device: torch.device, width: int = WIDTH, blocks: int = BLOCKS, *, sharded: bool) -> nn.Module:
    """Return blocks of one matrix each. Each is a unit of FSDP2."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Sequential(nn.Linear(width, width), nn.Tanh()) for _ in range(blocks))).to(device)
    if sharded:
        mesh = init_device_mesh(device.type, (dist.get_world_size(),))
        for block in model:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
    return model


def candidates(n: int = N, width: int = WIDTH, blocks: int = BLOCKS) -> list[dict[str, torch.Tensor]]:
    """Return candidates of such a model in host memory."""
    model = build(torch.device("cpu"), width, blocks, sharded=False)
    return [{k: v + 0.01 * torch.randn_like(v) for k, v in model.state_dict().items()} for _ in range(n)]


def run(setup: Setup) -> Iterator[Row]:
    with alone(setup):
        for kind, settings in (("plain", SETTINGS), ("FSDP2", SETTINGS | FORWARD)):
            for name, changed in settings.items():
                model = build(setup.device, sharded=kind == "FSDP2")
                twa = twa_scale.attach(model, candidates(), {"store": "packed4", **changed})
                x = torch.randn(8, WIDTH, device=setup.device)
                actual = []
                for _ in range(3):
                    backward = waits(setup, lambda: model(x).square().mean().backward())  # noqa: B023
                    actual.append((backward, waits(setup, twa.step)))
                    twa.zero_grad()
                twa.close()
                in_backward, in_step = actual[-1]
                measured = f"{in_backward} in forward and backward, {in_step} in the step"
                yield Row(f"{kind}, {name}", measured, "0, 1", actual[-1] == (0, 1) if setup.cuda else None)


def waits(setup: Setup, work: Callable[[], object]) -> int:
    """Return the number of operations that made the host wait. On a CPU it is 0."""
    if not setup.cuda:
        work()
        return 0
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            work()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing" in str(warning.message) for warning in seen)
