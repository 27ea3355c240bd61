"""The test model on meshes of two dimensions: replicas of shards (HSDP), and tensor parallelism with FSDP2."""

from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from tests.old_torch import forget_sharding

SIZES = {"hsdp": [2, 4], "fsdp2-tp": [2, 4], "columns-tp": [4], "hsdp-tp": [4], "tp": [2]}
ENGINES = [*SIZES]
TP = "tp"


def mesh_of(engine: str) -> DeviceMesh:
    """Return all ranks in the shape that the engine needs. The last dimension has size 2 if their number is even."""
    forget_sharding()
    size = dist.get_world_size()
    match engine:
        case "hsdp":
            pods = 2 - size % 2
            return init_device_mesh("cpu", (pods, size // pods), mesh_dim_names=("pods", "dp"))
        case "fsdp2-tp" | "columns-tp":
            return init_device_mesh("cpu", (size // 2, 2), mesh_dim_names=("dp", TP))
        case "hsdp-tp":
            return init_device_mesh("cpu", (2, size // 4, 2), mesh_dim_names=("pods", "dp", TP))
        case _:
            return init_device_mesh("cpu", (size,), mesh_dim_names=(TP,))


def parallelize(model: nn.Module, mesh: DeviceMesh) -> None:
    """Split along every dimension with every style. norm1 and the stem remain ordinary parameters.

    The heads of a fused projection do not lie in its rows one after the other: attention gets it whole.
    """
    head: Any = model
    plan: dict[str, ParallelStyle] = {
        "embed": RowwiseParallel(input_layouts=Replicate(), output_layouts=Replicate()),
        "head": ColwiseParallel(output_layouts=Replicate()),
    }
    for i, block in enumerate(head.blocks):
        block.norm2.register_forward_pre_hook(lambda _, inputs: along_the_sequence(inputs[0], mesh))
        plan |= {
            f"blocks.{i}.qkv": ColwiseParallel(output_layouts=Replicate()),
            f"blocks.{i}.out": RowwiseParallel(input_layouts=Replicate()),
            f"blocks.{i}.norm2": SequenceParallel(),
            f"blocks.{i}.up": ColwiseParallel(input_layouts=Shard(1)),
            f"blocks.{i}.down": RowwiseParallel(),
        }
    parallelize_module(model, mesh, plan)
    head.head.weight = head.embed.weight


def along_the_sequence(x: Tensor, mesh: DeviceMesh) -> DTensor:
    """Give each rank its part of the tokens (of different sizes), as a sequence-parallel norm expects them."""
    return DTensor.from_local(x, mesh, [Replicate()], run_check=False).redistribute(placements=[Shard(1)])


def last_dimension(parameter: nn.Parameter) -> Shard:
    """For FSDP2's shard_placement_fn: split columns if their number is even, otherwise rows."""
    local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
    return Shard(local.ndim - 1 if local.shape[-1] % 2 == 0 else 0)


def data_ranks(engine: str, size: int) -> int:
    """Return how many of `size` ranks see different data."""
    return 1 if engine == "tp" else size // 2 if engine.endswith("-tp") else size


def data_place(model: nn.Module, rank: int, size: int) -> tuple[int, int]:
    """Return which part of the data a rank sees, and their number. Tensor-parallel ranks see the same part."""
    for p in model.parameters():
        if isinstance(p, DTensor) and TP in (p.device_mesh.mesh_dim_names or ()):
            combined = p.device_mesh[TP].size()
            return rank // combined, size // combined
    return rank, size
