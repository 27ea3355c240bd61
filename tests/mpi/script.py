"""The script that mpirun starts in these tests. It has no torch process group unless it creates one.

`python -m tests.mpi.script CASE DIRECTORY`: what the case returns on rank r is left in DIRECTORY/r.pt.
"""

import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

import twa_scale
from tests import models
from tests.mpi.settings import BATCH, CONFIGS, PODS, STEPS
from twa_scale.errors import CandidateError, TwaError
from twa_scale.ranks import Group, World, exit_process, rendezvous


def train(model: torch.nn.Module, config: dict[str, Any], group: Group, **options: Any) -> dict[str, Any]:
    """Train with a different part of each batch on every rank of `group`."""
    twa = twa_scale.attach(model, models.candidates(scalar_shape=(1,)), config, **options)
    for step in range(STEPS):
        models.loss(model, models.part(models.batch(step, BATCH), group.rank, group.size)).backward()
        twa.step()
        twa.zero_grad()
    result = {"weights": gathered(model), "coefficients": twa.coefficients.clone()}
    twa.close()
    return result


def gathered(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return the whole parameters on every rank, as the next forward pass uses them."""
    if isinstance(model, FSDPModule):
        model.reshard()
    parameters = {name: p.full_tensor() if isinstance(p, DTensor) else p for name, p in model.named_parameters()}
    return {name: p.detach().clone() for name, p in parameters.items()}


def replicas() -> dict[str, Any]:
    group = Group.world()
    return {name: train(models.build(seed=99, scalar_shape=(1,)), config, group) for name, config in CONFIGS.items()}


def sharded() -> dict[str, Any]:
    """Train FSDP2 over gloo with coefficient gradients over MPI; then the same in pods of two ranks."""
    with World.from_environment().joined(torch.device("cpu")):
        group, config = Group.world(), CONFIGS["block"] | {"comm": "mpi"}
        result = {"block": train(models.wrap(models.build(seed=99, scalar_shape=(1,)), "fsdp2"), config, group)}
        if group.size == 4:
            mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pods", "ranks"))
            model = models.build(seed=99, scalar_shape=(1,))
            fully_shard(model, mesh=mesh["ranks"])
            result[PODS] = train(model, config, group, replica_group=mesh.get_group("pods"))
    return result


def spoiled() -> dict[str, Any]:
    """Attach with an invalid candidate on the last rank."""
    group, states = Group.world(), models.candidates()
    if group.rank == group.size - 1:
        states[1]["head.weight"] = states[1]["head.weight"][1:]
    try:
        twa_scale.attach(models.build(), states)
    except CandidateError as error:
        return {"error": str(error)}
    return {}


def wants_gloo() -> dict[str, Any]:
    """Ask for a torch backend without a torch process group."""
    try:
        twa_scale.attach(models.build(), models.candidates(), {"comm": "gloo"})
    except TwaError as error:
        return {"error": str(error)}
    return {}


def methods() -> dict[str, Any]:
    group = Group.world()
    local = torch.arange(6, dtype=torch.float64).view(2, 3).T * (group.rank + 1)  # not contiguous
    gathered = torch.empty(2 * group.size, dtype=torch.bfloat16)
    group.all_gather(gathered, torch.full((2,), group.rank, dtype=torch.bfloat16))
    copied = torch.full((2, 2), group.rank, dtype=torch.int64)
    group.copy_from(group.size - 1, copied)
    return {
        "kind": type(group).__name__,
        "sum": group.sum_(local),
        "whole": group.sum_(torch.tensor(2**53 + group.rank)),
        "half": group.sum_(torch.tensor([0.5, group.rank], dtype=torch.bfloat16)),
        "none": group.sum_(torch.empty(0)),
        "third": group.sum_(torch.tensor(1 / 3 + group.rank, dtype=torch.float64)),
        "gather": group.gather({"rank": group.rank}),
        "broadcast": group.broadcast(group.rank, group.size - 1),
        "all_gather": gathered,
        "copied": copied,
    }


def dies() -> dict[str, Any]:
    """Fail on one rank while the others wait for it."""
    with World.from_environment().joined(torch.device("cpu")):
        group = Group.world()
        if group.rank == 1:
            raise RuntimeError("the data is not mounted on this node")
        group.gather(0)
    return {}


def lost() -> dict[str, Any]:
    """One rank does not reach the server of rank 0."""
    world = World.from_environment()
    cut_off = patch.object(rendezvous, "connect", side_effect=OSError("rank 0 is not reachable"))
    with cut_off if world.rank == 1 else nullcontext(), world.joined(torch.device("cpu")):
        return {}


if __name__ == "__main__":
    torch.set_num_threads(1)
    case, directory = sys.argv[1:]
    for name in case.split(","):
        results = globals()[name]()
        torch.save(results, Path(directory) / f"{name}-{World.from_environment().rank}.pt")
    exit_process(0)
