"""What a run writes down as it goes: one JSON object a line, and the same for TensorBoard. Rank 0 only."""

import json
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter


class Records:
    """Appends to metrics.jsonl and to TensorBoard's event files; on other ranks it does nothing."""

    def __init__(self, directory: Path, *, active: bool, step: int) -> None:
        """Open the records of a run that stands at `step`; what it will do again, evaluations too, is dropped."""
        self._path = directory / "metrics.jsonl"
        self._board: SummaryWriter | None = None
        if not active:
            return
        known = read_records(directory) if step else []
        kept = [line for line in known if line["step"] < step or (line["step"] == step and "lr" in line)]
        self._path.write_text("".join(json.dumps(line) + "\n" for line in kept))
        self._board = SummaryWriter(str(directory / "tensorboard"), purge_step=step)

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Write one line."""
        if self._board is None:
            return
        with self._path.open("a") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
        for name, value in values.items():
            self._board.add_scalar(name, value, step)

    def close(self) -> None:
        """Flush."""
        if self._board is not None:
            self._board.close()


def read_records(directory: Path) -> list[dict[str, Any]]:
    """Return the lines that a run has written so far, without one that a crash cut short."""
    path = directory / "metrics.jsonl"
    lines = []
    for line in path.read_text(errors="replace").splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(line))
        except ValueError:
            break
    return lines
