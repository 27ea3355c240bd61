"""What a run will need, before anything starts: memory of a rank, bytes read, bytes on the wire of a step."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from twa_scale.config import RunConfig
from twa_scale.cost import staging_bytes, store_bytes
from twa_scale.engines import ParameterInfo
from twa_scale.engines.describe import named_parameters, persistent_buffers
from twa_scale.errors import ConfigError
from twa_scale.kernels import Dense, choose_kernels
from twa_scale.layout import Layout, match
from twa_scale.memory import resident
from twa_scale.optimizer import make_optimizer
from twa_scale.sources import Candidate, open_candidates
from twa_scale.sources.mapped import mapped
from twa_scale.spans import share
from twa_scale.streaming import scratch_bytes
from twa_scale.tasks import Batch, Task, build_task, stack
from twa_scale.training.batches import make_batches
from twa_scale.training.model import ZERO_ENGINES, blocks_of, resolve_engine
from twa_scale.training.zero import ZERO, load_stages
from twa_scale.world import World

_ELEMENT = 4  # weights and gradients are float32


@dataclass(frozen=True)
class Plan:
    """The needs of a run. Memory is that of the rank that holds most, in bytes."""

    ranks: int
    device: str
    """`cpu` or `cuda`."""
    store: str
    num_candidates: int
    num_groups: int
    trained_elements: int
    local_sizes: dict[str, int]
    """Trained elements of each tensor on a rank."""
    mapped_bytes: int | None
    """Of the candidates, what store `mapped` reads on a rank in each step; None where it cannot be had."""
    memory: dict[str, int]
    """What is there from attach to the end."""
    attach: dict[str, int]
    """What comes on top while candidates are read."""
    step: dict[str, int]
    """What comes on top while a step is taken."""
    host: dict[str, int]
    """What lies in host memory although the run is on GPUs, with `store_device: cpu`; not part of the peak."""
    bytes_read: int
    """Of the candidates, per rank."""
    wire: dict[str, int]
    """Bytes that a rank sends inside its pod in a step, by what they are."""
    wire_between_pods: dict[str, int]
    """Bytes that the first rank of a pod sends to other pods in a step, by what they are."""
    notes: tuple[str, ...]

    @property
    def local_elements(self) -> int:
        """Trained elements of a rank."""
        return sum(self.local_sizes.values())

    @property
    def peak(self) -> int:
        """Peak of resident memory of a rank."""
        return sum(self.memory.values()) + max(sum(self.attach.values()), sum(self.step.values()))


def make_plan(config: RunConfig, ranks: int) -> Plan:
    """Work out the needs of `config` on `ranks` ranks.

    Reads the headers of the candidates and builds the model without memory, so that it finds what does not fit
    together, too.

    Raises:
        TwaError: whatever `run` would raise before it reads the candidates.
    """
    row = Dense.one(torch.ones(1))
    # These load compilers, which take memory: that of the kernels, and torch's with its first optimizer.
    choose_kernels(config.kernels, torch.device("cpu")).project(row, row.values)
    make_optimizer(config, nn.Parameter(torch.zeros(1)))
    if config.engine in ZERO_ENGINES:
        load_stages()
    engine = resolve_engine(config.engine, World(rank=0, size=ranks, local_rank=0), config.pods)
    shards = ranks // config.pods
    task = build_task(config.task)
    examples = task.dataset(config.split)
    micro = make_batches(
        examples, config.split, config.batch_size, config.micro_batch_size, 0, ranks, config.seed
    ).micro_batch_size
    with torch.device("meta"):
        model = task.model().to(torch.float32)
    runtime = resident()  # with what the task imports, and data that it holds in memory
    _, parameters = named_parameters(model)
    buffers = persistent_buffers(model)
    candidates = open_candidates(config.candidates)
    layout = match(parameters, buffers, candidates, config)
    activations, notes = _activations(task, model, config, stack([examples[0]] * micro))
    n = len(candidates)
    owned = {name: _owned(info, shards, engine) for name, info in parameters.items()}
    held = (
        sum(owned.values()) if engine in ("fsdp2", "zero3") else sum(prod(info.shape) for info in parameters.values())
    )
    local = {name: owned[name] for name in layout.group_of}
    device = "cuda" if config.device == "cuda" or (config.device == "auto" and torch.cuda.is_available()) else "cpu"
    elements = sum(prod(parameters[name].shape) for name in layout.group_of)
    itemsize = max(candidate.dtype(layout.source(name)).itemsize for name in owned for candidate in candidates)
    streaming = {"streaming": scratch_bytes(n, max(owned.values()), itemsize, config.read_chunk)}
    store = {f"store ({config.store})": store_bytes(config.store, n, local.values())}
    offloaded = device == "cuda" and config.store_device == "cpu"
    beside = {"buffers of the store": staging_bytes(config.store, n, local.values())} if offloaded else store
    numbers = {"coefficient gradients (twa_scale)": 8 * (n + 1) * len(layout.groups), "loss (twa-scale run)": 16}
    return Plan(
        ranks=ranks,
        device=device,
        store=config.store,
        num_candidates=n,
        num_groups=len(layout.groups),
        trained_elements=elements,
        local_sizes=local,
        mapped_bytes=_mapped_bytes(candidates, layout, local) if device == "cpu" else None,
        memory={
            "python and libraries": runtime,
            "weights": held * _compute(config) if engine in ZERO_ENGINES else held * _ELEMENT,
            **_partitions(sum(owned.values()), engine, config),
            "buffers": sum(prod(b.shape) * b.element_size() for b in buffers.values()),
            **beside,
        },
        attach={} if offloaded else streaming,
        step={"activations": activations, **_transient(model, parameters, engine, config)},
        host={**store, **streaming} if offloaded else {},
        bytes_read=_bytes_read(candidates, layout, owned),
        wire=_wire(model, parameters, shards, engine, config, numbers),
        wire_between_pods={name: _all_reduced(size, config.pods) for name, size in numbers.items() if config.pods > 1},
        notes=tuple(notes),
    )


def _owned(info: ParameterInfo, ranks: int, engine: str) -> int:
    """Elements of one parameter in the basis of the first rank, which never has fewer than others."""
    numel = prod(info.shape)
    match engine:
        case "plain":
            return numel
        case "ddp" | "zero1" | "zero2" | "zero3":  # ZeRO-1 and 2 cut the whole, which comes to the same
            return share(numel, 0, ranks)[1]
        case _:  # FSDP2 deals out whole rows
            rows = info.shape[0] if info.shape else 1
            return share(rows, 0, ranks)[1] * (numel // max(rows, 1))


def _transient(
    model: nn.Module, parameters: dict[str, ParameterInfo], engine: str, config: RunConfig
) -> dict[str, int]:
    """Whole parameters and gradients that exist for a moment of a step."""
    total = sum(prod(info.shape) for info in parameters.values())
    largest = max(prod(info.shape) for info in parameters.values())
    if engine == "plain":
        return {"gradients": 2 * largest * _ELEMENT}
    if engine == "ddp":
        return {"gradients and buckets": 2 * total * _ELEMENT}
    if engine in ZERO_ENGINES:
        settings = {**ZERO, **(config.deepspeed or {}).get("zero_optimization", {})}
        bucket = 2 * min(int(settings["reduce_bucket_size"]), total)
        if engine == "zero1":  # every rank has the gradient until it is reduced at the end
            return {"gradients": total * _ELEMENT, "reduce buckets": bucket * _ELEMENT}
        if engine == "zero2":
            return {"reduce buckets": bucket * _ELEMENT}
        gathered = min(total, largest + int(settings["stage3_prefetch_bucket_size"]))
        # Gathered flat, then copied; the bucket is put into the order of the ranks, then reduced to a part of it.
        return {"gathered parameters": 2 * gathered * _compute(config), "reduce buckets": 5 * bucket // 4 * _ELEMENT}
    blocks = blocks_of(model)
    sizes = [sum(p.numel() for p in block.parameters()) for block in blocks]
    root = total - sum(sizes)
    block = max(sizes, default=0)
    compute = 2 if config.precision == "bfloat16" else 4
    # Gathered: the root, and the block at work beside the one that is prefetched. Reduced: the block's gradient, its
    # copy in the order of the ranks, and those of the root at the end.
    return {
        "gathered parameters": (root + 2 * block) * compute,
        "gradients": max(2 * block, 2 * root) * _ELEMENT,
    }


def _compute(config: RunConfig) -> int:
    """Bytes of a weight that DeepSpeed computes with."""
    low = any((config.deepspeed or {}).get(key, {}).get("enabled") for key in ("bf16", "fp16"))
    return 2 if low else _ELEMENT


def _partitions(owned: int, engine: str, config: RunConfig) -> dict[str, int]:
    """What DeepSpeed keeps beside the weights it computes with, also where those are float32 themselves."""
    if engine not in ZERO_ENGINES:
        return {}
    return {
        "float32 partition (DeepSpeed)": owned * _ELEMENT,
        "gradient partition (DeepSpeed)": owned * _compute(config),
    }


def _activations(task: Task, model: nn.Module, config: RunConfig, batch: Batch) -> tuple[int, list[str]]:
    """Bytes that autograd keeps for backward, found by a forward pass without memory."""
    batch = {key: value.to("meta") for key, value in batch.items()}
    own = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()._cdata  # views of one memory, as transposed weights are, count once
        if storage not in own:
            kept[storage] = tensor
        return tensor

    try:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), _Affirmative():
            task.loss(model, batch)
    except Exception as error:
        return 0, [f"activations are not counted: the model does not run without memory ({type(error).__name__})"]
    sizes = [tensor.untyped_storage().nbytes() for tensor in kept.values()]
    scale = 0.5 if config.precision == "bfloat16" else 1.0
    return int(scale * (sum(sizes) + 2 * max(sizes, default=0))), []


class _Affirmative(TorchFunctionMode):
    """Says yes where a model looks at values that are not there: "is nothing masked", "is it one sequence"."""

    def __torch_function__(
        self, function: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if function is torch.Tensor.__bool__ and args[0].is_meta:
            return True
        return function(*args, **(kwargs or {}))


def _bytes_read(candidates: Sequence[Candidate], layout: Layout, owned: dict[str, int]) -> int:
    return sum(
        elements * sum(candidate.dtype(layout.source(name)).itemsize for candidate in candidates)
        for name, elements in owned.items()
    )


def _mapped_bytes(candidates: Sequence[Candidate], layout: Layout, local: dict[str, int]) -> int | None:
    try:
        for name in local:
            for candidate in candidates:
                mapped(candidate, layout.source(name))
    except ConfigError:
        return None
    return _bytes_read(candidates, layout, local)


def _all_reduced(size: int, ranks: int) -> int:
    """Bytes that a rank sends when `size` bytes are all-reduced along a ring."""
    return int(2 * (ranks - 1) / ranks * size)


def _wire(
    model: nn.Module,
    parameters: dict[str, ParameterInfo],
    ranks: int,
    engine: str,
    config: RunConfig,
    numbers: dict[str, int],
) -> dict[str, int]:
    """Ring algorithms: (R - 1) / R of the data for a gather or a scatter, twice that for an all-reduce."""
    part = (ranks - 1) / ranks
    weights = sum(prod(info.shape) for info in parameters.values())
    gradients = sum(prod(info.shape) for info in parameters.values() if info.trainable)
    compute = 2 if config.precision == "bfloat16" else 4
    back = 0.0 if config.pods == 1 else part  # the sum over the pods comes back from the first rank
    wire = {name: int(_all_reduced(size, ranks) + back * size) for name, size in numbers.items()}
    if engine == "ddp":
        wire["gradient all-reduce (DDP)"] = _all_reduced(gradients * _ELEMENT, ranks)
        wire["weights all-gather (twa_scale)"] = int(part * gradients * _ELEMENT)
    if engine in ZERO_ENGINES:
        reduced = _all_reduced(gradients * _compute(config), ranks)
        wire["gradient reduction (DeepSpeed)"] = reduced if engine != "zero3" else reduced // 2
        gathered = int(part * weights * _compute(config))
        if engine == "zero3":  # once in forward and once in backward
            wire["parameter all-gathers (DeepSpeed)"] = 2 * gathered
        else:
            wire["weights all-gather (twa_scale)"] = gathered
    if engine == "fsdp2":
        in_blocks = sum(p.numel() for block in blocks_of(model) for p in block.parameters())
        # Blocks are gathered in forward and in backward; the rest stays in between.
        wire["parameter all-gathers (FSDP2)"] = int(part * (weights + in_blocks) * compute)
        wire["gradient reduce-scatter (FSDP2)"] = int(part * gradients * _ELEMENT)
    return wire
