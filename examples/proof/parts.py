"""Parts of a long comparison: each leaves a row of numbers in a file, and is never run again once it is there."""

import json
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from twa_scale.output.publish import replace_file

Row = dict[str, Any]


@dataclass(frozen=True)
class Part:
    """A piece of work. One that was killed is called again: it resumes, or begins anew.

    Args:
        name: of its row.
        settings: all that the row depends on, so that it is not taken for one of other settings.
        run: does the work.
    """

    name: str
    settings: Row
    run: Callable[[], Row]


class Rows:
    """The results of finished parts: a JSON file each, in one directory."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def __contains__(self, name: str) -> bool:
        return self._path(name).exists()

    def __getitem__(self, name: str) -> Row:
        row: Row = json.loads(self._path(name).read_text())
        return row

    def __setitem__(self, name: str, row: Row) -> None:
        """Write a row so that a kill leaves all of it or nothing."""
        replace_file(self._path(name), (json.dumps(row, indent=2) + "\n").encode())

    def _path(self, name: str) -> Path:
        return self.directory / f"{name}.json"


def check_rows(parts: list[Part], rows: Rows) -> None:
    """Check that the rows that are there were made with the settings of their parts.

    Raises:
        SystemExit: a row was made with other settings, so that it cannot be compared with new ones.
    """
    for part in parts:
        if part.name in rows and rows[part.name]["settings"] != part.settings:
            before, now = differing(rows[part.name]["settings"], part.settings)
            raise SystemExit(
                f"{rows.directory}/{part.name}.json has the settings {before}; they are now {now}. Remove the file to "
                "run the part again, and the files of the parts that depend on it."
            )


def differing(before: Row, now: Row) -> tuple[Row, Row]:
    """Return those of two settings that differ, by dotted keys."""
    a, b = flat(before), flat(now)
    keys = [key for key in {**a, **b} if key not in a or key not in b or a[key] != b[key]]
    return {key: a[key] for key in keys if key in a}, {key: b[key] for key in keys if key in b}


def flat(settings: Row, prefix: str = "") -> Row:
    """Return settings without sections: {"a": {"b": 1}} is {"a.b": 1}."""
    found: Row = {}
    for key, value in settings.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found


def run_parts(parts: list[Part], rows: Rows) -> None:
    """Run the parts whose rows are not there yet, one after another.

    Raises:
        SystemExit: a row was made with other settings.
    """
    check_rows(parts, rows)
    for part in parts:
        if part.name not in rows:
            start = time.perf_counter()
            row = part.run()
            rows[part.name] = {**row, "settings": part.settings}
            print(f"{rows.directory}: {part.name} in {time.perf_counter() - start:.0f} s: {row}", flush=True)


def slug(name: str) -> str:
    """Return the name of a method as a name of its part, and so of a file: "TWA + anneal 60" is "TWA+anneal-60"."""
    return re.sub(r"[^\w+.-]+", "-", name.replace(" + ", "+"))
