"""The rows of this rank, and their exchange with the ranks that hold other parts of them."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch

from twa_scale.average.rows.exchange import RowExchange
from twa_scale.average.rows.shapes import rows_of
from twa_scale.base.spans import Span
from twa_scale.kernels import Segments
from twa_scale.ranks import Group, Reduction


@dataclass(frozen=True)
class Part:
    """The rows of one span."""

    group: int
    """The index of the group of its tensor."""
    segments: Segments
    """The elements of each row."""
    columns: slice
    """The columns of these rows in the values of this rank."""
    rows: torch.Tensor
    """The indices of the rows in the tensor, (count,), int64."""


class RowRun(NamedTuple):
    """Consecutive rows of a tensor that have consecutive columns on this rank."""

    name: str
    """The name of the tensor."""
    first: int
    """The index of the first row in the tensor."""
    columns: slice

    def pieces(self, count: int) -> Iterator["RowRun"]:
        """Yield runs of at most `count` rows that tile this one."""
        for start in range(self.columns.start, self.columns.stop, count):
            columns = slice(start, min(start + count, self.columns.stop))
            yield RowRun(self.name, self.first + start - self.columns.start, columns)

    @property
    def stop(self) -> int:
        """The index after that of the last row."""
        return int(self.first + self.columns.stop - self.columns.start)


class RowSlots:
    """Columns for all rows of which this rank holds elements, span by span.

    A row that a shard boundary cuts has a column on several ranks, and sums over it are exchanged. All other rows are
    on one rank of the shard group, so that nothing is exchanged for them.

    Args:
        spans: the trained spans of this rank, with their groups.
        lengths: the number of elements of a row, for each tensor that has rows. The same on every rank.
        sizes: the number of elements of each of these tensors.
        shards: the ranks that together hold the weights.
        device: the device of the values.
    """

    def __init__(
        self,
        spans: Mapping[Span, int],
        lengths: Mapping[str, int],
        sizes: Mapping[str, int],
        shards: Group,
        device: torch.device,
    ) -> None:
        self.shards = shards
        self._device = device
        self.counts = {name: sizes[name] // length for name, length in lengths.items()}
        """The number of rows of each tensor."""
        self.parts: dict[Span, Part] = {}
        self.num_columns = 0
        """The number of columns of this rank, R."""
        partial: list[torch.Tensor] = []
        keys: list[torch.Tensor] = []  # the positions of the rows among those of all tensors
        first_key = dict(zip(self.counts, [0, *torch.tensor([*self.counts.values()]).cumsum(0).tolist()], strict=False))
        for span, group in spans.items():
            if span.name not in lengths or not len(span):
                continue
            rows, segments, is_partial = rows_of(span, lengths[span.name])
            columns = slice(self.num_columns, self.num_columns + segments.count)
            self.parts[span] = Part(group, segments, columns, rows)
            self.num_columns = columns.stop
            partial.append(is_partial)
            keys.append(first_key[span.name] + rows)
        empty = torch.empty(0, dtype=torch.int64)
        counts = torch.tensor([part.segments.count for part in self.parts.values()], dtype=torch.int64)
        groups = torch.tensor([part.group for part in self.parts.values()], dtype=torch.int64)
        self.groups = groups.repeat_interleave(counts).to(device)
        """The index of the group of each column, (R,), int64."""
        self._find_shared_rows(torch.cat([empty, *keys]), torch.cat([empty.bool(), *partial]))
        self.runs = tuple(self._runs(owned=False))
        """The rows of this rank."""
        self.owned_runs = tuple(self._runs(owned=True))
        """The rows that this rank owns. The owned runs of all ranks contain each row once."""

    def _find_shared_rows(self, keys: torch.Tensor, partial: torch.Tensor) -> None:
        """Find the rows that are divided over several ranks, and number them equally on all ranks. Collective."""
        columns = partial.nonzero()[:, 0]
        local_keys = keys[columns]
        of_ranks = self.shards.gather(local_keys)
        shared, position = torch.unique(torch.cat(of_ranks), return_inverse=True)
        offset = sum(len(of_rank) for of_rank in of_ranks[: self.shards.rank])
        first = torch.full((len(shared),), len(position)).scatter_reduce_(
            0, position, torch.arange(len(position)), "amin"
        )
        local_positions = position[offset : offset + len(local_keys)]
        owned = torch.ones(self.num_columns, dtype=torch.bool)
        owned[columns] = first[local_positions] == torch.arange(offset, offset + len(local_keys))
        self._num_shared = len(shared)
        self._columns, self._shared_positions = columns.to(self._device), local_positions.to(self._device)
        self.owned = owned.to(self._device)
        """Whether a column counts in sums over all rows, as one of the columns of a row does, (R,), bool."""

    def reduce_(self, values: torch.Tensor, reduction: Reduction, exchange: RowExchange) -> None:
        """Sum the values of each row over the shard group and average them over replicas, in place. Collective.

        All ranks that hold a row get the same bits, because rows that are cut are summed over all ranks in one
        reduction.

        Args:
            values: (k, R).
            reduction: sums over ranks.
            exchange: averages over replicas. Its values for rows that are cut are not used.
        """
        shared = values.new_zeros(len(values), self._num_shared)
        shared.index_add_(1, self._shared_positions, values[:, self._columns])
        exchange.average_(values)
        if self._num_shared:
            values[:, self._columns] = reduction.average_(shared)[:, self._shared_positions]

    def _runs(self, *, owned: bool) -> Iterator[RowRun]:
        for span, part in self.parts.items():
            columns, rows = torch.arange(part.columns.start, part.columns.stop), part.rows
            if owned:
                kept = self.owned[part.columns].cpu()
                columns, rows = columns[kept], rows[kept]
            if not len(rows):
                continue
            ends = ((rows.diff() != 1) | (columns.diff() != 1)).nonzero()[:, 0] + 1
            edges = [0, *ends.tolist(), len(rows)]
            for start, stop in pairwise(edges):
                yield RowRun(span.name, int(rows[start]), slice(int(columns[start]), int(columns[stop - 1]) + 1))

    def gather_rows(self, values: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the values of all rows of each tensor, on the CPU of every rank. Collective.

        Args:
            values: the values of the columns, (k, R).

        Returns:
            The values by tensor name, each (k, rows of the tensor).
        """
        parts: dict[str, list[Part]] = {name: [] for name in self.counts}
        for span, part in self.parts.items():
            parts[span.name].append(part)
        result = {}
        for name, count in self.counts.items():
            out = values.new_zeros(len(values), count)
            for part in parts[name]:
                owned = self.owned[part.columns]
                out[:, part.rows.to(self._device)[owned]] = values[:, part.columns][:, owned]
            result[name] = self.shards.sum_(out).cpu()
        return result

    def local(self, values_by_name: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Return the values of the columns of this rank, (k, R), from those of all rows by name."""
        values = torch.empty(len(next(iter(values_by_name.values()))), self.num_columns, device=self._device)
        for span, part in self.parts.items():
            of_tensor = values_by_name[span.name]  # on any device
            values[:, part.columns] = of_tensor[:, part.rows.to(of_tensor.device)].to(self._device)
        return values
