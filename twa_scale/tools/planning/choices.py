"""Which stores a rank of a planned run has memory for."""

from dataclasses import dataclass

import torch

from twa_scale.base.process_memory import machine_memory
from twa_scale.config.kinds import STORES, MappedFiles, StoreName, store_kind
from twa_scale.store import staging_bytes, store_bytes, update_bytes
from twa_scale.tools.planning.plan import Plan


@dataclass(frozen=True)
class Choice:
    """A store in place of the configured one, in bytes of the rank that holds most."""

    store: StoreName
    nbytes: int
    """Deltas and center."""
    page_cache: int
    """Of the candidates' files that `mapped` reads in every step; ranks of one node share them."""
    host: int
    """What has to lie in host memory when the rank is on a GPU, with `store_device: cpu`."""
    peak: int
    """Of the whole rank, without the page cache and `host`."""
    moved: dict[str, int]
    """By `project` and by `combine`, in every step."""
    fits: bool
    """Whether there is memory for all of it, the page cache included."""
    obstacle: str
    """Why it cannot be taken, whatever the memory."""


@dataclass(frozen=True)
class Choices:
    """All stores, and the memory that they were held against."""

    stores: tuple[Choice, ...]
    configured: StoreName
    memory: int
    """Bytes that a rank has."""
    assumed: str
    """What was assumed to say so; nothing where it was given."""
    host_memory: int
    """Bytes of host memory that a rank on a GPU has."""
    host_assumed: str
    """What was assumed to say so; nothing where it was given."""

    @property
    def own(self) -> Choice:
        """The configured store."""
        return next(choice for choice in self.stores if choice.store == self.configured)

    @property
    def most_exact(self) -> StoreName | None:
        """The most exact store that fits, if one does."""
        return next((choice.store for choice in self.stores if choice.fits), None)

    @property
    def verdict(self) -> str:
        """One line for people."""
        best = (
            f"the most exact store that fits is {self.most_exact}"
            if self.most_exact
            else "no store does: take more ranks or, if activations are the most, recompute them or shorten the context"
        )
        return best if self.own.fits else f"{self.configured}, as configured, does not fit; {best}"


def choose_store(plan: Plan, memory: int | None = None, host_memory: int | None = None) -> Choices:
    """Hold every store against the memory of a rank.

    Args:
        plan: of the run.
        memory: bytes that a rank has; when not given, what ranks on this machine would have.
        host_memory: bytes that a rank on a GPU has beside it, likewise.
    """
    found, assumed = (memory, "") if memory is not None else _memory_here(plan)
    host, host_assumed = (host_memory, "") if host_memory is not None else _host_memory_here(plan)
    stores = tuple(_choice(plan, store, found, host) for store in STORES)
    return Choices(stores, plan.store, found, assumed, host, host_assumed)


def _choice(plan: Plan, store: StoreName, memory: int, host_memory: int) -> Choice:
    def nbytes_of(name: StoreName) -> int:
        return store_bytes(name, plan.num_candidates, plan.local_sizes.values())

    def in_peak(name: StoreName) -> int:
        return staging_bytes(name, plan.num_candidates, plan.local_sizes.values()) if plan.host else nbytes_of(name)

    mapped = plan.mapped_bytes if isinstance(store_kind(store), MappedFiles) else 0
    obstacle = "only on a CPU, from files in which tensors lie in one piece" if mapped is None else ""
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
    ranks = "the rank alone has" if plan.ranks == 1 else f"all {plan.ranks} ranks share"
    return machine_memory() // plan.ranks, f"{ranks} the memory of this machine"
