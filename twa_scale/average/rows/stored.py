"""Write the corrections of rows to a file next to the state, and read them. Each rank handles its own rows."""

from collections.abc import Mapping
from pathlib import Path

import torch

from twa_scale.average.rows.slots import RowSlots
from twa_scale.average.state import StoredRows
from twa_scale.average.state.rows_file import BASE, BEST, RowsFile, digest, new_directory
from twa_scale.base.spans import Span
from twa_scale.output import TensorSpec, Writer, writing
from twa_scale.ranks import Pods

PIECE_BYTES = 4 << 20
"""The maximum number of bytes that are converted at a time."""
_ONE_FILE = 1 << 62  # bytes: the file is never split


def write_rows(output: Path, slots: RowSlots, kinds: Mapping[str, torch.Tensor], pods: Pods) -> StoredRows:
    """Write a new file of rows into a new directory in `output`, and return its description for a state. Collective.

    Each rank of the first pod writes the rows that it owns. The file gets its name after all of them have succeeded.

    Args:
        output: the directory of the state.
        slots: the rows of this rank.
        kinds: the values of the columns of this rank, (k, R) float32, by kind: see `rows_file`.
        pods: all ranks.

    Raises:
        OutputError: a value is not finite, or the file could not be written. Raised on every rank; no file remains.
    """
    directory, result = pods.broadcast(new_directory()), None
    with pods.agree():
        # Only the ranks of the first pod call these collectives. `writing` and `digest` raise errors on all of them or
        # on none, so that no rank waits for another.
        if pods.number == 0:
            k = len(next(iter(kinds.values())))
            specs = [
                TensorSpec(f"{kind}/{name}", (count, k), torch.float32)
                for kind in kinds
                for name, count in slots.counts.items()
            ]
            with writing(output / directory, specs, slots.shards, base=BASE, max_shard_size=_ONE_FILE) as writer:
                for kind, values in kinds.items():
                    _write(writer, slots, kind, values)
            result = digest(output / directory, slots.shards)
    nbytes, checksum = pods.broadcast(result)  # type: ignore[misc]
    return StoredRows(directory=directory, nbytes=nbytes, sha256=checksum, has_best=BEST in kinds)


def read_rows(file: RowsFile, slots: RowSlots, kind: str, out: torch.Tensor) -> torch.Tensor:
    """Fill `out`, (k, R), with the values of the columns of this rank, and return it. Not collective.

    Raises:
        StateError: the file cannot be read, or a value is not finite.
    """
    for run in slots.runs:
        for piece in run.pieces(_rows_in_piece(len(out))):
            values = file.read(kind, piece.name, piece.first, piece.stop)
            out[:, piece.columns] = values.to(out.device).T
    return out


def _write(writer: Writer, slots: RowSlots, kind: str, values: torch.Tensor) -> None:
    k = len(values)
    for run in slots.owned_runs:
        for piece in run.pieces(_rows_in_piece(k)):
            span = Span(f"{kind}/{piece.name}", piece.first * k, piece.stop * k)
            writer.write(span, values[:, piece.columns].T.flatten())


def _rows_in_piece(k: int) -> int:
    return max(1, PIECE_BYTES // (4 * k))
