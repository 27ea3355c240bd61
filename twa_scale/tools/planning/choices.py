"""Compare all stores with the memory of a rank."""

from dataclasses import dataclass

import torch

from twa_scale.base.process_memory import machine_memory
from twa_scale.config.kinds import STORES, MappedFiles, StoreName, store_kind
from twa_scale.store import staging_bytes, store_bytes, update_bytes
from twa_scale.tools.planning.plan import Plan


@dataclass(frozen=True)
class Choice:
    """The memory of a run with one of the stores, in bytes, for the rank that needs most."""

    store: StoreName
    nbytes: int
    """The bytes of the deltas and the center."""
    page_cache: int
    """The bytes of the candidates' files that `mapped` reads in every step. The ranks of a node share them."""
    host: int
    """The bytes in host memory if the rank is on a GPU, with `store_device: cpu`."""
    peak: int
    """The peak memory of the rank, without the page cache and `host`."""
    moved: dict[str, int]
    """The bytes that `project` and `combine` move in every step."""
    fits: bool
    """Whether the memory suffices, including the page cache."""
    obstacle: str
    """The reason why the store cannot be used with any memory, or an empty text."""


@dataclass(frozen=True)
class Choices:
    """All stores, and the memory of a rank."""

    stores: tuple[Choice, ...]
    configured: StoreName
    memory: int
    """The bytes of memory of a rank."""
    assumed: str
    """The assumption behind `memory`; empty if the user gave it."""
    host_memory: int
    """The bytes of host memory of a rank on a GPU."""
    host_assumed: str
    """The assumption behind `host_memory`; empty if the user gave it."""

    @property
    def configured_choice(self) -> Choice:
        """The choice of the configured store."""
        return next(choice for choice in self.stores if choice.store == self.configured)

    @property
    def most_exact(self) -> StoreName | None:
        """The most exact store that fits, or None."""
        return next((choice.store for choice in self.stores if choice.fits), None)

    @property
    def verdict(self) -> str:
        """The result of the comparison in one line."""
        best = (
            f"the most exact store that fits is {self.most_exact}"
            if self.most_exact
            else "no store fits: use more ranks or, if activations are largest, recompute them or shorten the context"
        )
        return best if self.configured_choice.fits else f"{self.configured}, as configured, does not fit; {best}"


def choose_store(plan: Plan, memory: int | None = None, host_memory: int | None = None) -> Choices:
    """Compare every store with the memory of a rank.

    Args:
        plan: the plan of the run.
        memory: bytes of memory of a rank; by default, that of ranks on this machine.
        host_memory: bytes of host memory of a rank on a GPU; by default, that of ranks on this machine.
    """
    available, assumed = (memory, "") if memory is not None else _memory_here(plan)
    host, host_assumed = (host_memory, "") if host_memory is not None else _host_memory_here(plan)
    stores = tuple(_choice(plan, store, available, host) for store in STORES)
    return Choices(stores, plan.store, available, assumed, host, host_assumed)


def _choice(plan: Plan, store: StoreName, memory: int, host_memory: int) -> Choice:
    def nbytes_of(name: StoreName) -> int:
        return store_bytes(name, plan.num_candidates, plan.span_sizes)

    def in_peak(name: StoreName) -> int:
        return staging_bytes(name, plan.num_candidates, plan.span_sizes) if plan.host else nbytes_of(name)

    mapped = plan.mapped_bytes if isinstance(store_kind(store), MappedFiles) else 0
    obstacle = "only on a CPU, from files with contiguous tensors" if mapped is None else ""
    nbytes, page_cache = nbytes_of(store), mapped or 0
    peak = plan.peak - in_peak(plan.store) + in_peak(store)
    host = sum(plan.host.values()) - nbytes_of(plan.store) + nbytes if plan.host else 0
    fits = not obstacle and peak + page_cache <= memory and host <= host_memory
    moved = update_bytes(nbytes, plan.local_elements, mapped=page_cache)
    return Choice(store, nbytes, page_cache, host, peak, moved, fits, obstacle)


def _memory_here(plan: Plan) -> tuple[int, str]:
    if plan.device == "cuda" and torch.cuda.is_available():
        return torch.cuda.get_device_properties(0).total_memory, "a GPU like the first one here for each rank"
    nbytes, assumed = _host_memory_here(plan)
    return nbytes, assumed if plan.device == "cpu" else f"{assumed}, which has no GPU"


def _host_memory_here(plan: Plan) -> tuple[int, str]:
    ranks = "the rank has" if plan.ranks == 1 else f"all {plan.ranks} ranks share"
    return machine_memory() // plan.ranks, f"{ranks} the memory of this machine"
