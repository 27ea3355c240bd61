"""Lightning's checkpoints: files that the first rank writes, and directories that all ranks write."""

from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from twa_scale.base.calls import running_calls
from twa_scale.ranks.destroying import destroy_process_group
from twa_scale.running.checkpoint import State
from twa_scale.running.state_file import plain

FILE = "average.ckpt"
"""The checkpoint of an average, in its own directory, or inside a checkpoint that is a directory."""


def directory_of(trainer: Any) -> Path | None:
    """Return the directory that the calling `trainer.save_checkpoint` writes, or None if it writes a file."""
    strategy = trainer.strategy
    sharded = (
        getattr(strategy, "_state_dict_type", "full") == "sharded"  # of FSDPStrategy
        or getattr(strategy, "_save_distributed_checkpoint", False)  # of ModelParallelStrategy
        or hasattr(strategy, "deepspeed_engine")
    )
    return Path(strategy.broadcast(_path_of_call(trainer))) if sharded else None


def _path_of_call(trainer: Any) -> str:
    """Return the argument of the `save_checkpoint` that is running, which callbacks do not receive."""
    for call in running_calls():
        if call.f_code.co_name == "save_checkpoint" and call.f_locals.get("self") is trainer:
            return str(call.f_locals["filepath"])
    raise AssertionError("called outside of trainer.save_checkpoint")


def states_of_all(state: State) -> list[State]:
    """Return the states of all ranks, in host memory, on the first rank; on other ranks an empty list. Collective.

    This is for checkpoints in one file, whose strategies also hold the whole model on the first rank.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [plain(state)]
    states: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    use_gloo = dist.get_backend() != "gloo"  # other backends would send it through the memory of GPUs
    group = dist.new_group(backend="gloo") if use_gloo else None
    dist.gather_object(_in_host_memory(plain(state)), states, group=group)
    if use_gloo:
        destroy_process_group(group)
    return states or []


def _in_host_memory(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: _in_host_memory(value) for key, value in tree.items()}
    return tree.cpu() if isinstance(tree, torch.Tensor) else tree


def copied(weights: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy of a state dict of a model in host memory."""
    return {
        name: value.detach().to("cpu", copy=True) if isinstance(value, torch.Tensor) else deepcopy(value)
        for name, value in weights.items()
    }


def directory_for_average(trainer: Any) -> Path:
    """Return a new directory in that of the checkpoints, because a model card next to these would describe them."""
    callback = trainer.checkpoint_callback
    return Path(getattr(callback, "dirpath", None) or trainer.default_root_dir) / "average"
