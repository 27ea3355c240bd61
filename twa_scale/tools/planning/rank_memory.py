"""What an engine holds of a model on a rank: its part of the parameters, and what comes and goes in a step."""

from math import prod

from torch import nn

from twa_scale.base.spans import share
from twa_scale.config import RunConfig
from twa_scale.engines import ParameterInfo
from twa_scale.run.deepspeed import ZERO
from twa_scale.run.model import ZERO_ENGINES, blocks_of

ELEMENT = 4
"""Bytes: weights and gradients are float32."""


def owned_elements(info: ParameterInfo, ranks: int, engine: str) -> int:
    """Return the elements of one parameter in the basis of the first rank, which never has fewer than others."""
    numel = prod(info.shape)
    match engine:
        case "plain":
            return numel
        case "ddp" | "zero1" | "zero2" | "zero3":  # ZeRO-1 and 2 cut the whole, which comes to the same
            return share(numel, 0, ranks)[1]
        case _:  # FSDP2 deals out whole rows
            rows = info.shape[0] if info.shape else 1
            return share(rows, 0, ranks)[1] * (numel // max(rows, 1))


def compute_bytes(config: RunConfig) -> int:
    """Return the bytes of a weight that DeepSpeed computes with."""
    low = any((config.deepspeed or {}).get(key, {}).get("enabled") for key in ("bf16", "fp16"))
    return 2 if low else ELEMENT


def partitions(owned: int, engine: str, config: RunConfig) -> dict[str, int]:
    """Return what DeepSpeed keeps beside the weights it computes with, also where those are float32 themselves."""
    if engine not in ZERO_ENGINES:
        return {}
    return {
        "float32 partition (DeepSpeed)": owned * ELEMENT,
        "gradient partition (DeepSpeed)": owned * compute_bytes(config),
    }


def transient(model: nn.Module, parameters: dict[str, ParameterInfo], engine: str, config: RunConfig) -> dict[str, int]:
    """Return the bytes of whole parameters and gradients that exist for a moment of a step."""
    total = sum(prod(info.shape) for info in parameters.values())
    largest = max(prod(info.shape) for info in parameters.values())
    if engine == "plain":
        return {"gradients": 2 * largest * ELEMENT}
    if engine == "ddp":
        return {"gradients and buckets": 2 * total * ELEMENT}
    if engine in ZERO_ENGINES:
        settings = {**ZERO, **(config.deepspeed or {}).get("zero_optimization", {})}
        bucket = 2 * min(int(settings["reduce_bucket_size"]), total)
        if engine == "zero1":  # every rank has the gradient until it is reduced at the end
            return {"gradients": total * ELEMENT, "reduce buckets": bucket * ELEMENT}
        if engine == "zero2":
            return {"reduce buckets": bucket * ELEMENT}
        gathered = min(total, largest + int(settings["stage3_prefetch_bucket_size"]))
        # Gathered flat, then copied; the bucket is put into the order of the ranks, then reduced to a part of it.
        return {
            "gathered parameters": 2 * gathered * compute_bytes(config),
            "reduce buckets": 5 * bucket // 4 * ELEMENT,
        }
    blocks = blocks_of(model)
    sizes = [sum(p.numel() for p in block.parameters()) for block in blocks]
    root = total - sum(sizes)
    block = max(sizes, default=0)
    compute = 2 if config.precision == "bfloat16" else 4
    # Gathered: the root, and the block at work beside the one that is prefetched. Reduced: the block's gradient, its
    # copy in the order of the ranks, and those of the root at the end.
    return {
        "gathered parameters": (root + 2 * block) * compute,
        "gradients": max(2 * block, 2 * root) * ELEMENT,
    }
