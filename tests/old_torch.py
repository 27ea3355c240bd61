"""What PyTorch 2.6 lacks on CPUs: stand-ins for it, and the reasons of skips."""

import torch
from torch.distributed.tensor import DTensor, debug

# Its own words for what it refuses to do.
_LACKS = {
    "FSDP+TP sharding does not support uneven sharding": "fully_shard refuses to divide uneven tensors of tensor parallelism",
    "ProcessGroupGloo does not support reduce_scatter": "its gloo has no reduce_scatter",
}


def why_not(error: Exception | None) -> str | None:
    """Return why this version of torch cannot do what a test asks for, if `error` says so; else None."""
    found = [why for words, why in _LACKS.items() if words in str(error)]
    return f"torch {torch.__version__}: {found[0]}" if found and torch.__version__ < "2.7" else None


def add_events_of_streams() -> None:
    """Give streams of CPUs the methods that `fully_shard` calls, as torch 2.7 has them: they do nothing there either."""
    stream = torch.cpu.Stream
    if not hasattr(stream, "record_event"):
        stream.record_event = lambda self, event=None: event or torch.cpu.Event()  # type: ignore[attr-defined]
        stream.wait_event = lambda self, event: None  # type: ignore[attr-defined]


def forget_sharding() -> None:
    """Clear what DTensor remembers of meshes."""
    if hasattr(debug, "_clear_sharding_prop_cache"):
        debug._clear_sharding_prop_cache()
    elif torch.__version__ < "2.8":
        DTensor._op_dispatcher.sharding_propagator.propagate_op_sharding.cache.cache_clear()
