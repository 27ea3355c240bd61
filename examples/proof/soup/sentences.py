"""Files with parts of the sentences.

One half of the validation sentences is to choose and to train coefficients by, the other one to judge settings by.
Trials also train by other parts.
"""

import csv
from functools import partial
from io import StringIO
from pathlib import Path

from examples.shared_directory import make_once

NAMES = ("chosen-by.csv", "judged-by.csv")


def write_halves(validation: Path, directory: Path) -> tuple[Path, Path]:
    """Write every other record of a CSV file to chosen-by.csv, and the others to judged-by.csv."""
    make_once(directory, {"halves of": validation.name}, partial(_write, validation))
    return directory / NAMES[0], directory / NAMES[1]


def _write(validation: Path, into: Path) -> None:
    with validation.open(newline="", encoding="utf-8") as file:
        header, *rows = csv.reader(file)
    into.mkdir()
    for i, name in enumerate(NAMES):
        with (into / name).open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([header, *rows[i::2]])


def spread(path: Path, number: int) -> str:
    """Return records of a CSV file at equal distances as one file: the sentences are sorted by their labels."""
    with path.open(newline="", encoding="utf-8") as file:
        header, *rows = csv.reader(file)
    number = min(number, len(rows))
    written = StringIO(newline="")
    csv.writer(written).writerows([header, *(rows[i * len(rows) // number] for i in range(number))])
    return written.getvalue()


def joined(first: Path, second: Path) -> str:
    """Return the records of two CSV files of the same columns as one file."""
    header, rest = second.read_text(encoding="utf-8").split("\n", 1)
    text = first.read_text(encoding="utf-8")
    assert text.startswith(f"{header}\n") and text.endswith("\n"), "write_splits has written other columns"
    return text + rest
