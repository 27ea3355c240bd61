"""Whole tensors of DTensors, with one collective for all of them: `full_tensor` takes milliseconds for each."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate


def whole_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return copies of the tensors, whole on every rank. All ranks of the meshes give the same names.

    Dimensions of a mesh are gathered from the first to the last: `fully_shard` splits what tensor parallelism has left,
    and its dimension of the mesh is the first.
    """
    local = {name: t.to_local() if isinstance(t, DTensor) else t for name, t in tensors.items()}
    meshes: dict[DeviceMesh, dict[str, DTensor]] = {}
    for name, tensor in tensors.items():
        if isinstance(tensor, DTensor):
            meshes.setdefault(tensor.device_mesh, {})[name] = tensor
    for mesh, parts in meshes.items():
        for i in range(mesh.ndim):
            sharded = {name: dim for name, t in parts.items() if (dim := _dimension(t.placements[i])) is not None}
            if not sharded or mesh.size(i) == 1:
                continue
            by_rank: list[Any] = [None] * mesh.size(i)
            dist.all_gather_object(by_rank, {name: local[name].detach() for name in sharded}, mesh.get_group(i))
            local |= {name: torch.cat([part[name] for part in by_rank], dim) for name, dim in sharded.items()}
    return {name: value.detach().clone() for name, value in local.items()}


def _dimension(placement: Any) -> int | None:
    """Return the dimension of a tensor that a dimension of a mesh splits, or None for copies."""
    if isinstance(placement, Replicate):
        return None
    dim = placement.dim  # of Shard, and of the placement that fully_shard gives what is split already
    assert isinstance(dim, int)
    return dim
