"""What a step of a planned run costs on this machine, and its attaching, from what was measured here."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from twa_scale.base.process_memory import free_memory
from twa_scale.config import RunConfig
from twa_scale.config.kinds import StoreName
from twa_scale.ranks import World
from twa_scale.store import store_bytes, update_bytes
from twa_scale.tools.bench.files import run_streaming
from twa_scale.tools.bench.stores import Bench, bench_bytes, run_bench
from twa_scale.tools.bench.timing import Measured
from twa_scale.tools.planning import Plan

_FREE = 0.5  # part of the free memory that is taken for measuring
_FILES = 10_000_000  # elements of the candidates that are written to measure how fast they are read, at most


@dataclass(frozen=True)
class Forecast:
    """What the average costs a rank on top of forward and backward."""

    elements: int
    """Trained elements of the rank that holds most."""
    measured: int
    """Elements that were measured; project and combine are scaled up from them."""
    stores: dict[StoreName, list[Measured]]
    """By store: the parts of a step and their sum; last, reading the candidates, where that was measured."""


@dataclass(frozen=True)
class Work:
    """What is to be measured."""

    stores: list[StoreName]
    elements: int
    candidates: int
    kernels: str
    device: torch.device
    groups: int = 1
    sizes: tuple[int, ...] = ()
    """Elements of tensors, as `run_bench` takes them."""
    file_elements: int | None = None
    """Of the candidates that are written for streaming; `elements` when not given."""

    def measure(self, threads: int | None, directory: Path | None) -> tuple[Bench, list[Measured]]:
        """Measure the stores and, with a directory to write into, reading and writing."""
        stores, n, kernels, device = self.stores, self.candidates, self.kernels, self.device
        bench = run_bench(stores, self.elements, n, threads, kernels, device, groups=self.groups, sizes=self.sizes)
        elements = self.file_elements or self.elements
        return bench, run_streaming(stores, elements, n, kernels, device, directory) if directory else []


def planned_work(plan: Plan, config: RunConfig, stores: list[StoreName], elements: int | None, world: World) -> Work:
    """Return what to measure for a planned run: all of a rank's elements, or what half of the free memory takes.

    Args:
        plan: of the run.
        config: that it was made of.
        stores: the configured one when there is none.
        elements: no more than these.
        world: the ranks that measure at once, and share the memory of this machine.
    """
    stores = stores or [config.store]
    device = world.device(config.device)
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else free_memory() // world.size
    measured = min(plan.local_elements, elements or plan.local_elements)
    while measured > 1 and bench_bytes(stores, measured, plan.num_candidates) > _FREE * free:
        measured = measured * 9 // 10
    sizes = tuple(plan.local_sizes.values())
    files = min(measured, _FILES)
    return Work(stores, measured, plan.num_candidates, config.kernels, device, plan.num_groups, sizes, files)


def forecast(plan: Plan, bench: Bench, files: Sequence[Measured]) -> Forecast:
    """Scale what was measured to the run; reduction and coefficient step are what they are.

    Args:
        plan: of the run.
        bench: made with its candidates and groups.
        files: what `run_streaming` found, of the same stores; may be empty.
    """
    scale = plan.local_elements / bench.elements
    rates = {row.what: row.rate for row in files}
    stores = {}
    for store, rows in bench.stores.items():
        seconds = {row.what: scale * row.seconds for row in rows}
        nbytes = store_bytes(store, plan.num_candidates, plan.local_sizes.values())
        moved = update_bytes(nbytes, plan.local_elements)
        project, combine = (Measured(what, seconds[what], moved[what]) for what in ("project", "combine"))
        parts = [project, bench.reduction, bench.coefficients, combine]
        step = Measured("step", sum(part.seconds for part in parts), sum(part.nbytes for part in parts))
        attach = [Measured("attach", plan.bytes_read / rates[f"attach, {store}"], plan.bytes_read)] if rates else []
        stores[store] = [*parts, step, *attach]
    return Forecast(plan.local_elements, bench.elements, stores)
