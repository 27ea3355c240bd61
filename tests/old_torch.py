"""Replacements for what PyTorch 2.6 lacks on CPUs, and the reasons of skips."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp._fully_shard import _fsdp_collectives
from torch.distributed.tensor import DTensor

OLD = torch.__version__ < "2.7"
ALONE: dict[str, Any] = {} if OLD else {"no_dist": True}
"""What `torch.distributed.checkpoint` is told where there is one process."""
# Its error messages for what it does not support. A failure that contains all of one is skipped with the reason.
_LACKS = {
    ("FSDP+TP sharding does not support uneven sharding",): "fully_shard refuses uneven shards of shards",
    ("fully_shard() got an unexpected keyword argument 'ignored_params'",): "fully_shard ignores no parameters",
    ("ProcessGroupGloo does not support reduce_scatter",): "its gloo has no reduce_scatter",
    ("'Stream' object has no attribute 'record_event'",): "fully_shard does not train on a CPU",
    ("has no attribute 'reset_iter_state'",): "FSDPModule has no reset_iter_state",
    ("step_inside_no_sync", "modified by an inplace operation"): "DDP overwrites what a backward pass needs",
    ("Dynamo only supports FSDP with use_orig_params=True",): "torch.compile needs use_orig_params of FSDP1",
    ("_sync_module_states", "Invalid scalar type"): "its gloo has no complex numbers",
    ("assert self.mask_buffer.data is not None",): "DTensor loses the mask of an embedding",
    (
        "triton/runtime/interpreter.py",
        "only 0-dimensional arrays",
    ): "the interpreter of Triton 3.2 needs an earlier numpy",
    ("distributed/tensor/_dispatch.py", "view size is not compatible"): "DTensor views its input in `linear`",
}


def why_not(failure: str) -> str | None:
    """Return the reason why this version of torch does not support a test, if its failure shows one, or None."""
    actual = [reason for words, reason in _LACKS.items() if all(word in failure for word in words)]
    return f"torch {torch.__version__}: {actual[0]}" if actual and OLD else None


def train_fsdp2_on_cpus() -> None:
    """Make `fully_shard` of torch 2.6 train on a CPU, as later versions do."""
    if not OLD or hasattr(torch.cpu.Stream, "record_event"):
        return
    copy = torch.split_with_sizes_copy

    def copy_and_keep_versions(*arguments: Any, out: list[Tensor], **options: Any) -> None:
        before = [tensor._version for tensor in out]
        copy(*arguments, out=out, **options)
        for tensor, version in zip(out, before, strict=True):
            torch._C._autograd._unsafe_set_version_counter(tensor, version)  # type: ignore[arg-type]

    # Gloo had no mean and returned the sum.
    setattr(_fsdp_collectives, "_get_gradient_divide_factors", lambda *groups_and_type: (1.0, _ranks(*groups_and_type)))  # noqa: B010
    setattr(torch, "split_with_sizes_copy", copy_and_keep_versions)  # noqa: B010
    setattr(torch.cpu.Stream, "record_event", lambda self, event=None: event or torch.cpu.Event())  # noqa: B010
    setattr(torch.cpu.Stream, "wait_event", lambda self, event: None)  # noqa: B010


def _ranks(shards: dist.ProcessGroup, replicas: dist.ProcessGroup | None, dtype: torch.dtype) -> float:
    return float(shards.size() * (replicas.size() if replicas else 1))


def forget_sharding() -> None:
    """Clear the caches of DTensor for meshes."""
    from torch.distributed.tensor import (
        debug,
    )  # imported here, because it imports torch._dynamo, which few test programs need

    if hasattr(debug, "_clear_sharding_prop_cache"):
        debug._clear_sharding_prop_cache()
    elif OLD:
        DTensor._op_dispatcher.sharding_propagator.propagate_op_sharding.cache.cache_clear()
