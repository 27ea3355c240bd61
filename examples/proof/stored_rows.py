"""The rows of finished seeds that the repository keeps, from which the tables of docs/proof.md can be made anywhere."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from examples.proof.parts import Part, Row, Rows
from twa_scale.output.publish import replace_file


def keep(path: Path, parts: list[Part], rows: Rows) -> None:
    """Write all rows of a finished seed into one file, with a digest of their settings."""
    kept = {part.name: {**rows[part.name], "settings": digest(part.settings)} for part in parts}
    replace_file(path, (json.dumps(kept, indent=1, sort_keys=True) + "\n").encode())


def kept_rows(path: Path, parts: list[Part]) -> Mapping[str, Row]:
    """Return the rows of a finished seed by part, or none if there is no file.

    Raises:
        SystemExit: a row was made with settings other than those of `parts`.
    """
    if not path.exists():
        return {}
    kept: dict[str, Row] = json.loads(path.read_text())
    for part in parts:
        if part.name not in kept or kept[part.name]["settings"] != digest(part.settings):
            raise SystemExit(
                f"{path}: {part.name} was made with other settings, which the history of the repository has. Remove "
                "the file to run the seed again."
            )
    return kept


def digest(settings: Row) -> str:
    """Return a digest of settings, whatever the order of their keys is."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
