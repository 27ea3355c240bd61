"""The estimate of attach and of a step of a planned run, from measurements on this machine."""

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

_FREE = 0.5  # the part of the free memory that measurements use
_FILES = 10_000_000  # the largest number of elements of candidates that are written to measure reading


@dataclass(frozen=True)
class Forecast:
    """The estimated cost of the average for a rank, on top of forward and backward."""

    elements: int
    """The number of trained elements of the rank with the most elements."""
    measured: int
    """The number of elements that were measured. `project` and `combine` are scaled from it."""
    stores: dict[StoreName, list[Measured]]
    """For each store, the parts of a step, their sum, and reading the candidates if that was measured."""


@dataclass(frozen=True)
class Work:
    """The parameters of a measurement."""

    stores: list[StoreName]
    elements: int
    candidates: int
    kernels: str
    device: torch.device
    groups: int = 1
    sizes: tuple[int, ...] = ()
    """The sizes of the spans: tensors, or their parts for experts; see `run_bench`."""
    file_elements: int | None = None
    """The number of elements of candidates that are written. Default: `elements`."""

    def measure(
        self, threads: int | None, directory: Path | None, row_length: int | None = None
    ) -> tuple[Bench, list[Measured]]:
        """Measure the stores, also by output row if `row_length` is given, and files if a directory is given."""
        stores, n, kernels, device = self.stores, self.candidates, self.kernels, self.device
        bench = run_bench(
            stores,
            self.elements,
            n,
            threads,
            kernels,
            device,
            groups=self.groups,
            sizes=self.sizes,
            row_length=row_length,
        )
        elements = self.file_elements or self.elements
        return bench, run_streaming(stores, elements, n, kernels, device, directory) if directory else []


def planned_work(plan: Plan, config: RunConfig, stores: list[StoreName], elements: int | None, world: World) -> Work:
    """Return the measurement for a planned run, with all elements of a rank or those that fit in half of the memory.

    Args:
        plan: the plan of the run.
        config: the configuration of the plan.
        stores: the stores to measure; if empty, the configured one.
        elements: the largest number of elements.
        world: the ranks that measure at the same time and share the memory of this machine.
    """
    stores = stores or [config.store]
    device = world.device(config.device)
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else free_memory() // world.size
    measured = min(plan.local_elements, elements or plan.local_elements)
    while measured > 1 and bench_bytes(stores, measured, plan.num_candidates) > _FREE * free:
        measured = measured * 9 // 10
    files = min(measured, _FILES)
    return Work(stores, measured, plan.num_candidates, config.kernels, device, plan.num_groups, plan.span_sizes, files)


def forecast(plan: Plan, bench: Bench, files: Sequence[Measured]) -> Forecast:
    """Scale measurements to the size of the run. The reduction and the coefficient step are not scaled.

    Args:
        plan: the plan of the run.
        bench: measurements with the number of candidates and groups of the run.
        files: the result of `run_streaming` for the same stores, or empty.
    """
    scale = plan.local_elements / bench.elements
    rates = {row.name: row.rate for row in files}
    stores = {}
    for store, rows in bench.stores.items():
        seconds = {row.name: scale * row.seconds for row in rows}
        nbytes = store_bytes(store, plan.num_candidates, plan.span_sizes)
        moved = update_bytes(nbytes, plan.local_elements)
        project, combine = (Measured(name, seconds[name], moved[name]) for name in ("project", "combine"))
        parts = [project, bench.reduction, bench.coefficients, combine]
        step = Measured("step", sum(part.seconds for part in parts), sum(part.nbytes for part in parts))
        attach = [Measured("attach", plan.bytes_read / rates[f"attach, {store}"], plan.bytes_read)] if rates else []
        stores[store] = [*parts, step, *attach]
    return Forecast(plan.local_elements, bench.elements, stores)
