"""Estimate the needs of a run before it starts: memory of a rank, bytes read, and bytes sent in a step."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import nn

from twa_scale.average.attach import experts_of
from twa_scale.average.layout import Layout, alias_jobs, match, wanted_tensors
from twa_scale.average.optimizer import make_optimizer
from twa_scale.base.process_memory import resident
from twa_scale.base.spans import Span
from twa_scale.candidates import Candidate, open_candidates
from twa_scale.candidates.mapped import mapped
from twa_scale.candidates.read_ahead import Job, are_remote, job_bytes, largest_read
from twa_scale.candidates.streaming import scratch_bytes
from twa_scale.config import RunConfig
from twa_scale.config.kinds import StoreName
from twa_scale.engines import ParameterInfo
from twa_scale.engines.complex_weights import real_parameter_infos, real_view
from twa_scale.engines.live_adapter import live_adapter
from twa_scale.engines.parameters import named_parameters, persistent_buffers
from twa_scale.errors import ConfigError
from twa_scale.kernels import Dense, choose_kernels
from twa_scale.ranks import World
from twa_scale.run.batches import make_batches
from twa_scale.run.engines import RunEngine, run_engine
from twa_scale.run.engines.run_engine import all_reduced
from twa_scale.run.tasks import build_task, stack
from twa_scale.store import staging_bytes, store_bytes
from twa_scale.tools.planning.activations import activation_bytes
from twa_scale.tools.planning.rows import rows_of_plan


@dataclass(frozen=True)
class Plan:
    """The resources that a run needs, in bytes. Memory is that of the rank that needs most."""

    ranks: int
    device: str
    """`cpu` or `cuda`."""
    store: StoreName
    num_candidates: int
    num_groups: int
    trained_elements: int
    local_sizes: dict[str, int]
    """The number of trained elements of each tensor on a rank."""
    span_sizes: tuple[int, ...]
    """The number of elements of each span of a rank: a tensor or, with `groups: expert`, a stacked expert."""
    mapped_bytes: int | None
    """The bytes of the candidates that the store `mapped` reads on a rank in each step; None if it cannot be used."""
    memory: dict[str, int]
    """The memory from attach to the end, by description."""
    attach: dict[str, int]
    """The additional memory while candidates are read."""
    step: dict[str, int]
    """The additional memory during a step."""
    host: dict[str, int]
    """The host memory of a run on GPUs with `store_device: cpu`, which is not a part of the peak."""
    bytes_read: int
    """The bytes of the candidates that a rank reads, for the rank that reads most."""
    wire: dict[str, int]
    """The bytes that a rank sends inside its pod in a step, by description."""
    wire_between_pods: dict[str, int]
    """The bytes that the first rank of a pod sends to other pods in a step, by description."""
    notes: tuple[str, ...]

    @property
    def local_elements(self) -> int:
        """The number of trained elements of a rank."""
        return sum(self.local_sizes.values())

    @property
    def peak(self) -> int:
        """The peak resident memory of a rank."""
        return sum(self.memory.values()) + max(sum(self.attach.values()), sum(self.step.values()))


def make_plan(config: RunConfig, ranks: int) -> Plan:
    """Return the plan of a run with `config` on `ranks` ranks.

    It reads the headers of the candidates and builds the model on the meta device.

    Raises:
        TwaError: the errors that `run` raises before it reads the candidates.
    """
    _load_compilers(config)
    engine = run_engine(config, World(rank=0, size=ranks, local_rank=0))
    engine.load_libraries()
    task = build_task(config.task)
    examples = task.dataset(config.split)
    micro = make_batches(
        examples, config.split, config.batch_size, config.micro_batch_size, 0, ranks, config.seed
    ).micro_batch_size
    with torch.device("meta"):
        model = task.model().to(torch.float32)
    runtime = resident()  # includes the imports of the task, and its data in memory
    tensors = _tensors_of(model, config)
    parameters, layout, n = tensors.parameters, tensors.layout, len(tensors.candidates)
    activations, notes = activation_bytes(task, model, config, stack([examples[0]] * micro))
    owned = {name: engine.owned_elements(info) for name, info in parameters.items()}
    read = {name: size for name, size in owned.items() if name in layout.names_in_candidates}
    local = {name: owned[name] for name in layout.group_of}
    device = "cuda" if config.device == "cuda" or (config.device == "auto" and torch.cuda.is_available()) else "cpu"
    streaming = {"streaming": _streaming_bytes(tensors, read, config)}
    sizes = _span_sizes(layout, local)
    store = {f"store ({config.store})": store_bytes(config.store, n, sizes)}
    offloaded = device == "cuda" and config.store_device == "cpu"
    store_on_device = {"buffers of the store": staging_bytes(config.store, n, sizes)} if offloaded else store
    rows = rows_of_plan(config, model, parameters, local, n)
    numbers = {"coefficient gradients (twa_scale)": 8 * (n + 1) * len(layout.groups), "loss (twa-scale run)": 16}
    if config.has_rows:
        numbers["whether weights overflow"] = 16
    between = {name: all_reduced(size, config.pods) for name, size in numbers.items()} if config.pods > 1 else {}
    return Plan(
        ranks=ranks,
        device=device,
        store=config.store,
        num_candidates=n,
        num_groups=len(layout.groups),
        trained_elements=sum(prod(parameters[name].shape) for name in layout.group_of),
        local_sizes=local,
        span_sizes=sizes,
        mapped_bytes=_mapped_bytes(tensors, local) if device == "cpu" else None,
        memory={
            "python and libraries": runtime,
            "weights": engine.weight_bytes(parameters),
            **engine.partition_bytes(parameters),
            "buffers": sum(prod(b.shape) * b.element_size() for b in tensors.buffers.values()),
            **store_on_device,
            **({"corrections of rows": rows.stored} if rows.stored else {}),
        },
        attach={} if offloaded else streaming,
        step={
            **activations,
            **engine.transient_bytes(model, parameters),
            **({"gradients of rows of all pods": rows.gathered} if rows.gathered else {}),
        },
        host={**store, **streaming} if offloaded else {},
        bytes_read=job_bytes(tensors.candidates, _jobs(tensors, read)),
        wire={**_summed(engine, numbers), **engine.wire_bytes(model, parameters)},
        wire_between_pods={**between, **({"corrections of rows, from every rank": rows.sent} if rows.sent else {})},
        notes=(*notes, *rows.notes),
    )


@dataclass(frozen=True)
class _Tensors:
    """The tensors of a model, and the candidates in which they were found."""

    parameters: dict[str, ParameterInfo]
    buffers: dict[str, torch.Tensor]
    candidates: Sequence[Candidate]
    layout: Layout


def _load_compilers(config: RunConfig) -> None:
    """Load the compilers of the kernels, and that of torch with its first optimizer, which need memory in a run."""
    row = Dense.one(torch.ones(1))
    choose_kernels(config.kernels, torch.device("cpu")).project(row, row.values)
    make_optimizer(config, nn.Parameter(torch.zeros(1)))


def _tensors_of(model: nn.Module, config: RunConfig) -> _Tensors:
    _, parameters = named_parameters(model)
    parameters = real_parameter_infos(parameters)
    buffers = {name: real_view(buffer) for name, buffer in persistent_buffers(model).items()}
    adapter = live_adapter(model)
    wanted = wanted_tensors(parameters, buffers, config, model, adapter)
    candidates = open_candidates(config.candidates, wanted=wanted, select=config.select)
    layout = match(parameters, buffers, candidates, config, adapter, experts_of(model, parameters, config))
    return _Tensors(parameters, buffers, candidates, layout)


def _streaming_bytes(tensors: _Tensors, read: dict[str, int], config: RunConfig) -> int:
    """Return the bytes of the buffers with which attach reads. `read` has the elements of a rank, by tensor."""
    candidates, layout = tensors.candidates, tensors.layout
    itemsize = max(candidate.dtype(layout.source(name)).itemsize for name in read for candidate in candidates)
    chunk, received = config.read_chunk, config.reads_in_flight if are_remote(candidates) else 0
    return scratch_bytes(
        len(candidates), max(read.values()), itemsize, largest_read(candidates, chunk), received=received
    )


def _summed(engine: RunEngine, numbers: dict[str, int]) -> dict[str, int]:
    """Return the bytes that a rank sends inside its pod for the small sums over all ranks."""
    pods = engine.config.pods > 1  # the first rank of a pod then sends the sum over pods to the others
    return {name: engine.all_reduced(size) + (engine.gathered(size) if pods else 0) for name, size in numbers.items()}


def _span_sizes(layout: Layout, local: dict[str, int]) -> tuple[int, ...]:
    """Return the sizes of the spans of a rank that holds the first elements of each tensor or expert."""
    spans = []
    for name, size in local.items():
        experts = layout.experts.get(name)
        spans += [span for _, span in Span(name, 0, size).split(max(1, experts.size if experts else size))]
    return tuple(len(span) for span in spans)


def _jobs(tensors: _Tensors, owned: dict[str, int]) -> Iterator[Job]:
    """Yield the reads of attach on the first rank, which also reads the buffers."""
    candidates, layout = tensors.candidates, tensors.layout
    counts = {**owned, **{name: tensors.buffers[name].numel() for name in layout.buffers}}
    for name, size in counts.items():
        yield Span(layout.source(name), 0, size), range(len(candidates))
    yield from alias_jobs([Span(name, 0, size) for name, size in owned.items()], layout, candidates)


def _mapped_bytes(tensors: _Tensors, local: dict[str, int]) -> int | None:
    candidates, layout = tensors.candidates, tensors.layout
    try:
        for name in local:
            for candidate in candidates:
                mapped(candidate, layout.source(name))
    except ConfigError:
        return None
    all_candidates = range(len(candidates))
    return job_bytes(candidates, ((Span(layout.source(name), 0, size), all_candidates) for name, size in local.items()))
