"""The file of the scores of a search. A search that was interrupted continues from it."""

import json
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

from twa_scale.average.search.methods import Array
from twa_scale.errors import StateError
from twa_scale.output import AppendedFile
from twa_scale.output.publish import output_errors

_FORMAT = 1


def digest_of(coefficients: Array) -> str:
    """Return the key of an average in the record."""
    return sha256(coefficients.astype("<f8").tobytes()).hexdigest()[:32]


class Record:
    """The scores in a file, to which scores can be added.

    Args:
        path: a file of JSON lines; created if it does not exist.
        candidates: a digest of the candidates; a record of others is refused.
        log: called with a message if the disk is full.

    Raises:
        StateError: the file is not a record, or of other candidates.
        OutputError: the file cannot be read or written.
    """

    def __init__(self, path: Path, candidates: str, log: Callable[[str], object]) -> None:
        header = {"twa_scale": "search", "format": _FORMAT, "candidates": candidates}
        self.scores: dict[str, float] = {}
        lines = [header]
        if path.exists():
            existing = _lines(path)
            if existing[:1] != [header]:
                raise StateError(
                    f"{path}: is not the record of a search of these candidates. Give another file, or remove it."
                )
            lines = existing
            self.scores = {str(line["key"]): float(line["score"]) for line in existing[1:]}
        else:
            with output_errors(path):
                path.parent.mkdir(parents=True, exist_ok=True)
        self._file = AppendedFile(path, b"".join(map(_line, lines)), log)

    def add(self, label: str, coefficients: Array, score: float) -> None:
        """Write one score."""
        self._file.write(_line({"key": digest_of(coefficients), "label": label, "score": score}))

    def close(self) -> None:
        """Close the file, after a last attempt to write lines that were delayed by a full disk."""
        self._file.close()


def _line(value: dict[str, Any]) -> bytes:
    return json.dumps(value).encode() + b"\n"


def _lines(path: Path) -> list[dict[str, Any]]:
    """Return the complete lines of a file.

    Raises:
        StateError: the file is not a record of a search.
    """
    with output_errors(path):
        text = path.read_bytes()
    try:
        lines = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith(b"\n")]
        if not all(isinstance(line, dict) for line in lines):
            raise ValueError
        for line in lines[1:]:
            str(line["key"]), float(line["score"])
    except (ValueError, KeyError, TypeError, RecursionError):
        raise StateError(f"{path}: is not the record of a search. Give another file, or remove it.") from None
    return lines
