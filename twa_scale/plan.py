"""What a run will need, before anything starts: memory of a rank, bytes read, bytes on the wire of a step."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import nn

from twa_scale.config import RunConfig
from twa_scale.engines import ParameterInfo
from twa_scale.engines.describe import named_parameters, persistent_buffers
from twa_scale.layout import Layout, match
from twa_scale.memory import resident
from twa_scale.sources import Candidate, open_candidates
from twa_scale.spans import share
from twa_scale.store import bytes_per_element
from twa_scale.streaming import scratch_bytes
from twa_scale.tasks import Batch, Task, build_task, stack
from twa_scale.training.batches import make_batches
from twa_scale.training.model import blocks_of, resolve_engine
from twa_scale.world import World

_ELEMENT = 4  # weights and gradients are float32


@dataclass(frozen=True)
class Plan:
    """The needs of a run. Memory is that of the rank that holds most, in bytes."""

    num_candidates: int
    num_groups: int
    trained_elements: int
    memory: dict[str, int]
    """What is there from attach to the end."""
    attach: dict[str, int]
    """What comes on top while candidates are read."""
    step: dict[str, int]
    """What comes on top while a step is taken."""
    bytes_read: int
    """Of the candidates, per rank."""
    wire: dict[str, int]
    """Bytes that a rank sends in a step, by what they are."""
    notes: tuple[str, ...]

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
    runtime = resident()
    engine = resolve_engine(config.engine, World(rank=0, size=ranks, local_rank=0))
    task = build_task(config.task)
    examples = task.dataset(config.split)
    micro = make_batches(
        examples, config.split, config.batch_size, config.micro_batch_size, 0, ranks, config.seed
    ).micro_batch_size
    with torch.device("meta"):
        model = task.model().to(torch.float32)
    _, parameters = named_parameters(model)
    buffers = persistent_buffers(model)
    candidates = open_candidates(config.candidates)
    layout = match(parameters, buffers, candidates, config)
    activations, notes = _activations(task, model, config, stack([examples[0]] * micro))
    n = len(candidates)
    owned = {name: _owned(info, ranks, engine) for name, info in parameters.items()}
    held = sum(owned.values()) if engine == "fsdp2" else sum(prod(info.shape) for info in parameters.values())
    store = bytes_per_element(config.store, n) * sum(owned[name] for name in layout.group_of)
    elements = sum(prod(parameters[name].shape) for name in layout.group_of)
    coefficients = 8 * (n + 1) * len(layout.groups)
    return Plan(
        num_candidates=n,
        num_groups=len(layout.groups),
        trained_elements=elements,
        memory={
            "python and libraries": runtime,
            "weights": held * _ELEMENT,
            "buffers": sum(prod(b.shape) * b.element_size() for b in buffers.values()),
            f"store ({config.store})": int(store),
        },
        attach={"streaming": scratch_bytes(n, max(owned.values()))},
        step={"activations": activations, **_transient(model, parameters, ranks, engine, config)},
        bytes_read=_bytes_read(candidates, layout, owned),
        wire=_wire(parameters, ranks, engine, config, coefficients),
        notes=tuple(notes),
    )


def _owned(info: ParameterInfo, ranks: int, engine: str) -> int:
    """Elements of one parameter in the basis of the first rank, which never has fewer than others."""
    numel = prod(info.shape)
    match engine:
        case "plain":
            return numel
        case "ddp":
            return share(numel, 0, ranks)[1]
        case _:  # FSDP2 deals out whole rows
            rows = info.shape[0] if info.shape else 1
            return share(rows, 0, ranks)[1] * (numel // max(rows, 1))


def _transient(
    model: nn.Module, parameters: dict[str, ParameterInfo], ranks: int, engine: str, config: RunConfig
) -> dict[str, int]:
    """Whole parameters and gradients that exist for a moment of a step."""
    total = sum(prod(info.shape) for info in parameters.values())
    largest = max(prod(info.shape) for info in parameters.values())
    if engine == "plain":
        return {"gradients": 2 * largest * _ELEMENT}
    if engine == "ddp":
        return {"gradients and buckets": 2 * total * _ELEMENT}
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
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            task.loss(model, batch)
    except Exception as error:
        return 0, [f"activations are not counted: the model does not run without memory ({type(error).__name__})"]
    sizes = [tensor.untyped_storage().nbytes() for tensor in kept.values()]
    scale = 0.5 if config.precision == "bfloat16" else 1.0
    return int(scale * (sum(sizes) + 2 * max(sizes, default=0))), []


def _bytes_read(candidates: Sequence[Candidate], layout: Layout, owned: dict[str, int]) -> int:
    return sum(
        elements * sum(candidate.dtype(layout.source(name)).itemsize for candidate in candidates)
        for name, elements in owned.items()
    )


def _wire(
    parameters: dict[str, ParameterInfo], ranks: int, engine: str, config: RunConfig, coefficients: int
) -> dict[str, int]:
    """Ring algorithms: (R - 1) / R of the data for a gather or a scatter, twice that for an all-reduce."""
    part = (ranks - 1) / ranks
    weights = sum(prod(info.shape) for info in parameters.values())
    gradients = sum(prod(info.shape) for info in parameters.values() if info.trainable)
    compute = 2 if config.precision == "bfloat16" else 4
    wire = {"coefficient gradients (twa_scale)": int(2 * part * coefficients)}
    if engine == "ddp":
        wire["gradient all-reduce (DDP)"] = int(2 * part * gradients * _ELEMENT)
        wire["weights all-gather (twa_scale)"] = int(part * gradients * _ELEMENT)
    if engine == "fsdp2":
        wire["parameter all-gathers (FSDP2)"] = int(2 * part * weights * compute)
        wire["gradient reduce-scatter (FSDP2)"] = int(part * gradients * _ELEMENT)
    return wire
