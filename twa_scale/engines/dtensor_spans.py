"""The spans of the local parts of DTensors, and the shard and replica groups of their mesh."""

from collections.abc import Collection, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, placement_types
from torch.distributed.tensor.placement_types import Placement

from twa_scale.base.spans import Span, block, share
from twa_scale.engines.private_attributes import require
from twa_scale.errors import EngineError
from twa_scale.ranks import Group

# The placement of a dimension that FSDP shards after tensor parallelism. A torch without it has no such placement.
_StridedShard: Any = getattr(placement_types, "_StridedShard", Shard)

Axis = tuple[int, ...]
"""One dimension of a mesh, identified by the ranks of this rank's process group along it. The names of dimensions
differ between meshes that torch slices and concatenates; the ranks do not."""


class MeshLayout:
    """The mesh of a model, divided into axes that shard parameters and axes that replicate all of them.

    The axes that shard any parameter form the shard group (FSDP, tensor parallelism). The other axes form the replica
    group (HSDP).

    Raises:
        EngineError: the meshes of the parameters are not slices of one mesh, or a placement is not supported.
    """

    def __init__(self, parameters: Mapping[str, DTensor]) -> None:
        self._placements = {name: _placements(name, parameter) for name, parameter in parameters.items()}
        if not parameters:
            raise EngineError("the model has no sharded parameter (ignored_params holds all of them): shard some.")
        self._mesh = max((p.device_mesh for p in parameters.values()), key=lambda mesh: mesh.ndim)
        self._dims = {axis: dim for dim, axis in enumerate(_axes(self._mesh))}
        for name, placements in self._placements.items():
            if not placements.keys() <= self._dims.keys():
                raise EngineError(
                    f"parameter {name!r} is on {parameters[name].device_mesh}, which is not a slice of {self._mesh}, "
                    "the mesh of other parameters; make all meshes slices of one."
                )
        axes = [axis for axis in self._dims if len(axis) > 1]  # an axis of one rank neither shards nor replicates
        self._shard_axes = [axis for axis in axes if any(axis in self._shardings(name) for name in parameters)]
        self.shard_group = self.group(self._shard_axes)
        self.replica_group = self.group([axis for axis in axes if axis not in self._shard_axes])

    def replicating_axes(self, name: str) -> tuple[Axis, ...]:
        """Return the axes of the shard group along which every rank holds the same part of this parameter."""
        return tuple(axis for axis in self._shard_axes if axis not in self._shardings(name))

    def group(self, axes: Collection[Axis]) -> Group:
        """Return the group of ranks that differ from this one along `axes` only. Collective for several axes."""
        dims = sorted(self._dims[axis] for axis in axes)
        if not dims:
            return Group.alone()
        if len(dims) == 1:
            return Group(self._mesh.get_group(dims[0]))
        names = self._mesh.mesh_dim_names
        assert names is not None  # torch cannot build such a model on a mesh without names
        part = self._mesh[tuple(names[dim] for dim in dims)]
        require("torch", part, ["_flatten"])
        return Group(part._flatten().get_group())  # the mesh caches it, so a later engine gets the same group

    def span(self, name: str, parameter: DTensor) -> Span:
        """Return the span of the local part of a parameter."""
        shape, local = tuple(parameter.shape), tuple(parameter.to_local().shape)
        starts, sizes = [0] * len(shape), list(shape)
        # FSDP shards what tensor parallelism has sharded, so its axis (_StridedShard) comes last.
        shardings = self._shardings(name).items()
        for axis, placement in sorted(shardings, key=lambda sharding: isinstance(sharding[1], _StridedShard)):
            start, stop = share(sizes[placement.dim], axis.index(dist.get_rank()), len(axis))
            starts[placement.dim] += start
            sizes[placement.dim] = stop - start
        if tuple(sizes) != local:
            raise EngineError(
                f"parameter {name!r} has local shape {local}, but {parameter.placements} of {shape} gives "
                f"{tuple(sizes)}; only tensors split as by torch.chunk are supported."
            )
        try:
            return block(name, shape, tuple(starts), tuple(sizes))
        except ValueError as error:
            raise EngineError(f"cannot split parameters along two inner dimensions: {error}.") from None

    def _shardings(self, name: str) -> dict[Axis, Any]:
        return {a: p for a, p in self._placements[name].items() if isinstance(p, (Shard, _StridedShard))}


def _axes(mesh: DeviceMesh) -> list[Axis]:
    return [tuple(dist.get_process_group_ranks(mesh.get_group(dim))) for dim in range(mesh.ndim)]


def _placements(name: str, parameter: DTensor) -> dict[Axis, Placement]:
    """Return the placement of a parameter along each axis of more than one rank."""
    for placement in parameter.placements:
        if not isinstance(placement, (Shard, _StridedShard, Replicate)):
            raise EngineError(f"parameter {name!r} is placed as {placement}; only Shard and Replicate are supported.")
    axes = zip(_axes(parameter.device_mesh), parameter.placements, strict=True)
    return {axis: placement for axis, placement in axes if len(axis) > 1}


def like_parameter(parameter: DTensor, local: torch.Tensor) -> DTensor:
    """Return a DTensor with this local part, and the shape and placements of `parameter`."""
    return DTensor.from_local(
        local,
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )
