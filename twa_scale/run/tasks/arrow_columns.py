"""One column of parquet and Arrow files, with random access to its rows."""

from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol

from twa_scale.run.tasks import arrow

_PIECE_COST = 1 << 27  # decoded bytes of the row groups in a run of consecutive rows
_CACHE = 2 * _PIECE_COST


class _File(Protocol):
    """A file in pieces: row groups of parquet, or record batches of Arrow."""

    sizes: list[int]
    """The number of rows of each piece."""
    costs: list[int]
    """The bytes that a read of a row decodes, for each piece: those of the whole row group, or 0 for a mapped piece."""

    def piece(self, i: int) -> Any:
        """Return the column of piece i, a pyarrow array."""


class _Parquet:
    def __init__(self, path: Path, column: str, setting: str) -> None:
        self._path, self._column = path, column
        with arrow.named_errors(path):
            self._file = arrow.open_parquet(path)
            arrow.require_columns(path, self._file.schema_arrow.names, {setting: column})
            groups = [self._file.metadata.row_group(i) for i in range(self._file.num_row_groups)]
        self.sizes = [group.num_rows for group in groups]
        self.costs = [group.total_byte_size for group in groups]

    def piece(self, i: int) -> Any:
        with arrow.named_errors(self._path):
            piece = self._file.read_row_group(i, columns=[self._column]).column(0)
            piece.validate(full=True)
            return piece


class _Mapped:
    def __init__(self, path: Path, column: str, setting: str) -> None:
        self._pieces = [batch.column(0) for batch in arrow.batches(path, {setting: column})]
        self.sizes = [len(piece) for piece in self._pieces]
        self.costs = [0] * len(self._pieces)

    def piece(self, i: int) -> Any:
        return self._pieces[i]


class Column:
    """The values of a column in the rows of several files.

    A row of a parquet file needs its whole row group, so the last row groups are kept, up to 256 MiB. `chunk_sizes` are
    the lengths of the chunks of consecutive rows that are best read together: row groups of 128 MiB, or mapped files.
    """

    def __init__(self, files: Sequence[Path], column: str, setting: str) -> None:
        """Open the files. Of parquet files only the metadata is read, and Arrow files are mapped.

        Args:
            files: parquet and Arrow files.
            column: the name of the column.
            setting: the setting that names it.

        Raises:
            ConfigError: a file cannot be read, or has no such column.
        """
        self._positions: list[tuple[Path, _File, int, int]] = []  # for each piece: file, number and first row
        costs: list[int] = []
        for path in files:
            file: _File = (_Parquet if path.suffix.lower() == arrow.PARQUET else _Mapped)(path, column, setting)
            firsts = accumulate(file.sizes, initial=0)
            self._positions += [
                (path, file, i, first) for i, first in zip(range(len(file.sizes)), firsts, strict=False)
            ]
            costs += file.costs
        sizes = [file.sizes[i] for _, file, i, _ in self._positions]
        self._ends = list(accumulate(sizes))
        self._costs = costs
        self._cache: OrderedDict[int, Any] = OrderedDict()
        self.chunk_sizes = _pieces(sizes, costs)

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def read(self, index: int) -> tuple[str, Any]:
        """Return the place of a row for messages, and its value.

        Raises:
            ConfigError: the file cannot be read.
        """
        number = bisect_right(self._ends, index)
        path, file, i, first = self._positions[number]
        row = index - (self._ends[number] - file.sizes[i])
        with arrow.named_errors(path):
            return f"{path}, row {first + row + 1}", self._piece(number, file, i)[row].as_py()

    def _piece(self, number: int, file: _File, i: int) -> Any:
        if not self._costs[number]:
            return file.piece(i)
        if number not in self._cache:
            while self._cache and sum(map(self._costs.__getitem__, self._cache)) + self._costs[number] > _CACHE:
                self._cache.popitem(last=False)
            self._cache[number] = file.piece(i)
        return self._cache[number]


def _pieces(sizes: list[int], costs: list[int]) -> tuple[int, ...]:
    """Return the numbers of rows in runs of pieces that cost at most `_PIECE_COST`, or of pieces that cost more."""
    result: list[int] = []
    total = _PIECE_COST + 1
    for size, cost in zip(sizes, costs, strict=True):
        total += cost
        if total > _PIECE_COST:
            result.append(0)
            total = cost
        result[-1] += size
    return tuple(size for size in result if size)
