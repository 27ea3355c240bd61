"""Measurements of `project` and `combine` for each store, relative to the speed of memory."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from twa_scale.base.spans import Span
from twa_scale.config import TwaConfig, validated
from twa_scale.config.kinds import StoreName
from twa_scale.errors import ConfigError
from twa_scale.kernels import Segments
from twa_scale.ranks import Group
from twa_scale.store import Store, make_store, store_bytes, update_bytes
from twa_scale.tools.bench.baselines import MEMORY, adamw, coefficient_optimizer, memory_rates, published, reduction
from twa_scale.tools.bench.timing import Measured, Operation, measure

_CHUNK = 1 << 20  # elements of each candidate that are in float32 while a store is filled
_SPAN = 1 << 26  # elements of the largest tensor


@dataclass(frozen=True)
class Bench:
    """The measurements of one process."""

    device: str
    threads: int
    elements: int
    candidates: int
    memory: list[Measured]
    """Reading and copying large memory, measured before and after everything else."""
    stores: dict[StoreName, list[Measured]]
    """For each store: `project`, `combine`, and the update (both, with the reduction and the coefficient step). If
    `row_length` is given, also `project` and `combine` by output row."""
    coefficients: Measured
    """The optimizer step of the coefficients."""
    others: list[Measured]
    """The reduction of the coefficient gradients, AdamW on the same weights, and the published method with uint8."""

    @property
    def read(self) -> float:
        """The best rate of reading large memory, in bytes per second."""
        return max(m.rate for m in self.memory if m.name == "read")

    @property
    def reduction(self) -> Measured:
        """The all-reduce of the coefficient gradients."""
        return self.others[0]


def run_bench(
    stores: list[StoreName],
    elements: int,
    candidates: int,
    threads: int | None,
    kernels: str,
    device: torch.device,
    *,
    groups: int = 1,
    sizes: Sequence[int] = (),
    row_length: int | None = None,
) -> Bench:
    """Measure the stores. One store at a time is in memory.

    Args:
        stores: the stores, as in the configuration.
        elements: the number of trained elements D of this rank.
        candidates: the number of candidates n.
        threads: the number of CPU threads of torch and of the kernels. Default: that of torch.
        kernels: the kernels, as in the configuration.
        device: the device of the store and the weights.
        groups: the number of groups G.
        sizes: the numbers of elements of the tensors, because each tensor has a fixed cost. Tensors beyond the first
            `elements` elements are left out. Default: a few large tensors.
        row_length: also measure sums and weights for output rows of this number of elements (`groups: tensor+row`).

    Raises:
        ConfigError: the kernels are unknown.
    """
    if threads:
        torch.set_num_threads(threads)
    gradient, weights = torch.randn(elements, device=device), torch.randn(elements, device=device)
    memory = memory_rates(elements * candidates, device)
    measured = {}
    for name in stores:
        config = validated(TwaConfig, {"store": name, "kernels": kernels}, "bench")
        store = make_store(config, candidates, device, _refuse)
        spans = _spans(elements, sizes)
        operations = _of_store(store, spans, candidates, groups, gradient, weights)
        if row_length:
            operations += _of_rows(store, spans, candidates, row_length, gradient, weights)
        measured[name] = measure(operations, device)
        store.close()
    others = [reduction(candidates, groups, device), adamw(weights, gradient), *published(candidates, gradient)]
    memory += memory_rates(elements * candidates, device)
    x = coefficient_optimizer(candidates, groups, device)
    (coefficients,) = measure([Operation("coefficient step", x.step, 28 * candidates * groups)], device)
    threads = torch.get_num_threads()
    return Bench(str(device), threads, elements, candidates, memory, measured, coefficients, others)


def parse_stores(names: str) -> list[StoreName]:
    """Return the stores of a comma-separated list.

    Raises:
        ConfigError: a store is unknown.
    """
    return [validated(TwaConfig, {"store": name}, "bench").store for name in names.split(",")]


def bench_bytes(stores: Sequence[StoreName], elements: int, candidates: int) -> int:
    """Return the approximate peak memory of `run_bench` in bytes."""
    filled = 3 * candidates * 4 * min(_CHUNK, elements)
    largest = max(store_bytes(store, candidates, [elements]) for store in stores)
    adamw, read = 12 * elements, min(4 * elements * candidates, MEMORY)
    return 8 * elements + max(largest + filled, adamw, read)


def _refuse(name: str) -> list[torch.Tensor]:
    raise ConfigError(
        "bench: store 'mapped' is as fast as the files that it maps, and the bench has no files; give other stores "
        "(--stores packed8,packed4)."
    )


def _spans(elements: int, sizes: Sequence[int]) -> list[tuple[Span, slice]]:
    """Return spans of at most `_SPAN` elements that cover `elements` elements, with their slices of a vector."""
    spans: list[tuple[Span, slice]] = []
    done = 0
    for i, size in enumerate(sizes or [elements]):
        for _, span in Span(str(i), 0, min(size, elements - done)).pieces(_SPAN):
            spans.append((span, slice(done, done + len(span))))
            done += len(span)
    return spans


def _of_store(
    store: Store,
    spans: list[tuple[Span, slice]],
    n: int,
    groups: int,
    gradient: torch.Tensor,
    weights: torch.Tensor,
) -> list[Operation]:
    """Fill a store, and return its operations."""
    candidates = torch.randn(n, min(_CHUNK, len(gradient)))
    for span, _ in spans:
        target = store.reserve(span)
        for start in range(0, len(span), _CHUNK):
            store.kernels.make_deltas(candidates[:, : len(span) - start], [1 / n] * n, target, start)
    optimizer = coefficient_optimizer(n, groups, gradient.device)
    (x,) = optimizer.param_groups[0]["params"]
    group = Group.world()

    def project() -> torch.Tensor:
        return torch.stack([store.project(span, gradient[indices], False) for span, indices in spans]).sum(0)

    def combine() -> None:
        for span, indices in spans:
            store.combine(span, x.detach()[0], 1.0, weights[indices])

    def update() -> None:
        x.grad = group.sum_(project().repeat(groups, 1))[:, :-1].to(torch.float32)
        optimizer.step()
        combine()

    moved = update_bytes(store.nbytes, len(gradient))
    return [
        Operation("project", project, moved["project"]),
        Operation("combine", combine, moved["combine"]),
        Operation("update", update, sum(moved.values())),
    ]


def _of_rows(
    store: Store,
    spans: list[tuple[Span, slice]],
    n: int,
    length: int,
    gradient: torch.Tensor,
    weights: torch.Tensor,
) -> list[Operation]:
    """Return the operations of a store for rows of this length."""
    divided = [(span, indices, Segments(length, span.start % length, len(span))) for span, indices in spans]
    count = sum(segments.count for *_, segments in divided)
    factors = [torch.randn(segments.count, n, device=gradient.device).T for *_, segments in divided]

    def project() -> None:
        for span, indices, segments in divided:
            for _ in store.project_rows(span, gradient[indices], False, segments):
                pass

    def combine() -> None:
        for (span, indices, segments), row_factors in zip(divided, factors, strict=True):
            store.combine(span, row_factors, 1.0, weights[indices], segments)

    moved = update_bytes(store.nbytes, len(gradient))
    return [
        Operation(f"project, rows of {length:,}", project, moved["project"] + 8 * (n + 1) * count),
        Operation(f"combine, rows of {length:,}", combine, moved["combine"] + 4 * n * count),
    ]
