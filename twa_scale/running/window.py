"""The last snapshots of this rank's weights: the oldest in float32, and the increment of each later one."""

from collections.abc import Iterator, Mapping, Sequence

import torch

from twa_scale.average.weights import to_device
from twa_scale.base.spans import Span
from twa_scale.config import TwaConfig
from twa_scale.errors import TwaError
from twa_scale.kernels import Dense, Packed, Trajectory
from twa_scale.kernels.torch.deltas import write_row
from twa_scale.kernels.torch.reference import widened
from twa_scale.running.settings import WindowSettings
from twa_scale.store import InMemoryStore, OffloadedStore, make_store

_CPU_PIECE = 1 << 20  # elements that are processed at a time, few enough for the cache
_GPU_PIECE = 1 << 24
Piece = tuple[slice, Dense | Packed, torch.Tensor]
"""Columns of a span, and views of the rows and of the base of these columns."""


class Window:
    """Snapshots of the spans of a rank. No method is collective.

    Snapshot k is the base plus the first k increments. An increment is the rounded difference between the weights and
    the previous snapshot as the store holds it, so that errors do not accumulate. The increments are the rows of a
    store. When the oldest snapshot is dropped, the next increment is added to the base, and its row is used again.

    Args:
        settings: the steps and the number of the snapshots, and the store.
        live: the weights of this rank, by span.
        buffers: the buffers of the model, not copied; empty on ranks that do not keep them.
        device: the device of the model.
        store_device: "auto" or "cpu", as in `TwaConfig`.

    Raises:
        ConfigError: there is not enough memory.
    """

    def __init__(
        self,
        settings: WindowSettings,
        live: Mapping[Span, torch.Tensor],
        buffers: Mapping[str, torch.Tensor],
        device: torch.device,
        store_device: str = "auto",
    ) -> None:
        self.settings = settings
        rows = settings.keep - 1
        config = TwaConfig(store=settings.store, store_device="cpu" if store_device == "cpu" else "auto")
        store = make_store(config, rows, device, lambda _: [])
        assert isinstance(store, InMemoryStore | OffloadedStore), settings.store
        self.store = store
        targets = {span: self.store.reserve(span) for span in live}
        self._rows_of_span = {span: (target.rows, target.center) for span, target in targets.items()}
        self.steps: list[int] = []
        """The steps of the snapshots, oldest first."""
        self.order: list[int] = []
        """The row of each snapshot except the oldest."""
        self.errors = torch.zeros(rows + 1, dtype=torch.float64, device=self.store.device)
        """The squared norm of the rounding error of each row's snapshot on this rank, followed by that of the base."""
        self.buffers = {
            name: torch.zeros(
                (count, *buffers[name].shape),
                dtype=buffers[name].dtype,
                device="cpu" if store_device == "cpu" else buffers[name].device,
            )
            for name, count in kept_buffers(buffers, settings.keep).items()
        }
        """The buffers by name, stacked over the snapshots in a ring, or only of the last one; see `buffer`."""
        self.taken = 0

    @property
    def count(self) -> int:
        """The number of snapshots, n."""
        return len(self.steps)

    @property
    def nbytes(self) -> int:
        """The bytes of the snapshots on this rank."""
        return self.store.nbytes + sum(buffer.nbytes for buffer in self.buffers.values())

    @property
    def spans(self) -> Sequence[Span]:
        """The spans that are held."""
        return list(self._rows_of_span)

    def rows_and_base(self, span: Span) -> tuple[Dense | Packed, torch.Tensor]:
        """Return the rows and the base of a span, without a copy."""
        rows, base = self._rows_of_span[span]
        assert rows is not None and base is not None
        return rows, base

    @torch.no_grad()
    def take(self, step: int, live: Mapping[Span, torch.Tensor], buffers: Mapping[str, torch.Tensor]) -> None:
        """Take a snapshot of the weights after `step`. If the window is full, the oldest snapshot is dropped.

        On a GPU, the host does not wait unless the store is in host memory.
        """
        if self.steps:
            self._add(live)
        else:
            self._begin(live)
        for name, buffer in self.buffers.items():
            buffer[self.taken % len(buffer)].copy_(buffers[name])
        self.steps = [*self.steps, step][-self.settings.keep :]
        self.taken += 1

    def _begin(self, live: Mapping[Span, torch.Tensor]) -> None:
        for span, values in live.items():
            base = self.rows_and_base(span)[1]
            base.copy_(values)
            self.errors[-1] += 0 * torch.linalg.vector_norm(base)  # NaN if the weights are not finite

    def _add(self, live: Mapping[Span, torch.Tensor]) -> None:
        """Add the increment of a dropped snapshot to the base, and write the new increment into a free row."""
        full = self.count == self.settings.keep
        kept = self.order[int(full) :]
        row = next(i for i in range(self.settings.keep) if i not in kept)
        if full:
            self.errors[-1].copy_(self.errors[row])
        self.errors[row] = 0
        dropped = self._marked([row]) if full else None
        newest = self._marked(kept)
        for span, values in live.items():
            self._add_span(span, values.detach(), row, dropped, newest)
        self.order = [*kept, row]

    def _add_span(
        self, span: Span, values: torch.Tensor, row: int, dropped: torch.Tensor | None, newest: torch.Tensor
    ) -> None:
        combine = self.store.kernels.combine
        for indices, part, base in self._pieces(span):
            before = torch.empty_like(base)
            if dropped is not None:  # The new increment replaces it in its row, the only free one.
                combine(part, dropped, base, 1.0, before)
                base.copy_(before)
            combine(part, newest, base, 1.0, before)
            difference = values[indices].to(before) - before
            kept = write_row(part, row, difference)
            self.errors[row] += torch.linalg.vector_norm(difference - kept).double().square()

    def _marked(self, rows: Sequence[int]) -> torch.Tensor:
        """Return the factors of all rows: 1 for `rows`, 0 for the others."""
        factors = torch.zeros(self.settings.keep - 1)
        factors[list(rows)] = 1
        return to_device(factors, self.store.device)

    def _pieces(self, span: Span) -> Iterator[Piece]:
        rows, base = self.rows_and_base(span)
        size = _CPU_PIECE if base.device.type == "cpu" else _GPU_PIECE
        run = rows.run * rows.tile
        step = rows.run * max(1, size // run)
        for tile in range(0, rows.count, step):
            first, part = rows.part(tile, tile + step)
            indices = slice(first, first + part.m)
            yield indices, part, base[indices]

    def row_map(self, center: Sequence[float]) -> Trajectory:
        """Return the meaning of the rows for a center with these weights of the snapshots."""
        return Trajectory(tuple(self.order), self.settings.keep - 1, tuple(center))

    @torch.no_grad()
    def write(self, a: torch.Tensor, live: Mapping[Span, torch.Tensor]) -> None:
        """Write sum_i a_i w_i of the snapshots into the weights of this rank; a is (n,), float64."""
        factors = self.row_map([]).of_candidates(a[:, None])[:, 0]
        for span, values in live.items():
            self.store.combine(span, to_device(factors[:-1].float(), values.device), float(factors[-1]), values)

    def snapshot(self, i: int, span: Span) -> Iterator[tuple[slice, torch.Tensor]]:
        """Yield (columns, float32 values) of a span at snapshot `i`, in several parts."""
        factors = self._marked(self.order[:i])
        for indices, part, base in self._pieces(span):
            values = torch.empty_like(base)
            self.store.kernels.combine(part, factors, base, 1.0, values)
            yield indices, values

    def buffer(self, name: str, i: int) -> torch.Tensor:
        """Return a buffer at snapshot `i`. A mask or a table of integers is that of the last snapshot."""
        values = self.buffers[name]
        return values[(self.taken - self.count + i) % len(values)]

    def parts(self, span: Span) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield the base (k,) and the increments (n - 1, k) of a span in float32, k columns at a time."""
        rows, base = self.rows_and_base(span)
        for start, part in widened(rows):
            values = part.transpose(0, 1).flatten(1)[self.order]
            low, high = max(start, 0), min(start + values.shape[1], len(base))
            yield base[low:high], values[:, low - start : high - start]

    def require_finite(self) -> None:
        """Check that the weights of all snapshots were finite.

        Raises:
            TwaError: names the first step whose weights were not finite.
        """
        wrong = ~torch.isfinite(self.squared_errors())
        if bool(wrong.any()):
            raise TwaError(
                f"the snapshot of step {self.steps[int(wrong.nonzero()[0])]} has weights that are not finite: training "
                "has diverged. Load the state of an earlier step."
            )

    def squared_errors(self) -> torch.Tensor:
        """Return the squared norms of the rounding errors of the snapshots over this rank's spans, (n,), float64."""
        return torch.cat([self.errors[-1:], self.errors[self.order]])


def _is_kept_for_each(buffer: torch.Tensor) -> bool:
    """Return whether a buffer is kept for each snapshot: statistics and counters, not masks and tables of positions."""
    return buffer.is_floating_point() or buffer.numel() == 1


def kept_buffers(buffers: Mapping[str, torch.Tensor], keep: int) -> dict[str, int]:
    """Return how many of each buffer a window of `keep` snapshots holds."""
    return {name: keep if _is_kept_for_each(buffer) else 1 for name, buffer in buffers.items()}
