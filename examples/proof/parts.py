"""Parts of a long comparison: each leaves a row of numbers in a file, and is never run again once it is there."""

import json
import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Row = dict[str, Any]


@dataclass(frozen=True)
class Part:
    """A piece of work. One that was killed is called again: it resumes, or begins anew."""

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
        path = self._path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".writing")
        temporary.write_text(json.dumps(row, indent=2) + "\n")
        os.replace(temporary, path)

    def _path(self, name: str) -> Path:
        return self.directory / f"{name}.json"


def run_parts(parts: list[Part], rows: Rows) -> None:
    """Run the parts whose rows are not there yet, one after another.

    Raises:
        SystemExit: a row was made with other settings, so that it cannot be compared with new ones.
    """
    for part in parts:
        if part.name in rows and rows[part.name]["settings"] != part.settings:
            raise SystemExit(
                f"{rows.directory}/{part.name}.json has the settings {rows[part.name]['settings']}; they are now "
                f"{part.settings}. Remove the file, and what depends on it, to run the part again."
            )
    for part in parts:
        if part.name not in rows:
            start = time.perf_counter()
            row = part.run()
            rows[part.name] = {**row, "settings": part.settings}
            print(f"{rows.directory}: {part.name} in {time.perf_counter() - start:.0f} s: {row}", flush=True)


def slug(name: str) -> str:
    """Return the name of a method as a name of its part, and so of a file: "TWA + anneal 60" is "TWA+anneal-60"."""
    return re.sub(r"[^\w+.-]+", "-", name.replace(" + ", "+"))
