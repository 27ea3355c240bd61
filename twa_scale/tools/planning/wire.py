"""What a rank sends in a step, by ring algorithms."""

from math import prod

from torch import nn

from twa_scale.config import RunConfig
from twa_scale.engines import ParameterInfo
from twa_scale.run.model import ZERO_ENGINES, blocks_of
from twa_scale.tools.planning.rank_memory import ELEMENT, compute_bytes


def all_reduced(size: int, ranks: int) -> int:
    """Return the bytes that a rank sends when `size` bytes are all-reduced along a ring."""
    return int(2 * (ranks - 1) / ranks * size)


def wire_bytes(
    model: nn.Module,
    parameters: dict[str, ParameterInfo],
    ranks: int,
    engine: str,
    config: RunConfig,
    numbers: dict[str, int],
) -> dict[str, int]:
    """Return the bytes that a rank sends inside its pod in a step, by what they are.

    They are (R - 1) / R of the data for a gather or a scatter, twice that for an all-reduce.

    Args:
        model: without memory.
        parameters: its own.
        ranks: R, those of a pod.
        engine: that shards it.
        config: of the run.
        numbers: bytes of the small sums over all ranks, by what they are.
    """
    part = (ranks - 1) / ranks
    weights = sum(prod(info.shape) for info in parameters.values())
    gradients = sum(prod(info.shape) for info in parameters.values() if info.trainable)
    compute = 2 if config.precision == "bfloat16" else 4
    back = 0.0 if config.pods == 1 else part  # the sum over the pods comes back from the first rank
    wire = {name: int(all_reduced(size, ranks) + back * size) for name, size in numbers.items()}
    if engine == "ddp":
        wire["gradient all-reduce (DDP)"] = all_reduced(gradients * ELEMENT, ranks)
        wire["weights all-gather (twa_scale)"] = int(part * gradients * ELEMENT)
    if engine in ZERO_ENGINES:
        reduced = all_reduced(gradients * compute_bytes(config), ranks)
        wire["gradient reduction (DeepSpeed)"] = reduced if engine != "zero3" else reduced // 2
        gathered = int(part * weights * compute_bytes(config))
        if engine == "zero3":  # once in forward and once in backward
            wire["parameter all-gathers (DeepSpeed)"] = 2 * gathered
        else:
            wire["weights all-gather (twa_scale)"] = gathered
    if engine == "fsdp2":
        in_blocks = sum(p.numel() for block in blocks_of(model) for p in block.parameters())
        # Blocks are gathered in forward and in backward; the rest stays in between.
        wire["parameter all-gathers (FSDP2)"] = int(part * (weights + in_blocks) * compute)
        wire["gradient reduce-scatter (FSDP2)"] = int(part * gradients * ELEMENT)
    return wire
