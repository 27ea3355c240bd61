"""Add the provenance and the model card to weights that another library has written."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from twa_scale.output.model_card import CARD, READ, with_card
from twa_scale.output.provenance import PROVENANCE
from twa_scale.output.publish import output_errors, replace_file


def add_provenance(directory: Path, origin: Mapping[str, Any], tags: Sequence[str] = ()) -> None:
    """Write twa_scale.json and README.md next to weights. On one rank.

    Args:
        directory: the directory of the weights. Its config.json and its card are read.
        origin: the `provenance`.
        tags: further tags of a new card.

    Raises:
        OutputError: a file cannot be read or written.
    """
    with output_errors(directory):
        small = {name: (directory / name).read_bytes() for name in (*READ, CARD) if (directory / name).is_file()}
    replace_file(directory / PROVENANCE, (json.dumps(origin, indent=2) + "\n").encode())
    replace_file(directory / CARD, with_card(small, origin, tags)[CARD])
