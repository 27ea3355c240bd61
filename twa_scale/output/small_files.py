"""Small files that are put beside the weights of an output."""

import os
import re
from collections.abc import Mapping
from pathlib import Path, PurePath

from twa_scale.errors import ConfigError
from twa_scale.output.file_layout import index_name
from twa_scale.output.provenance import PROVENANCE

Files = Mapping[str, bytes | Path]
"""Small files to put beside the weights: content, or what to copy, by their path there."""


def check_files(files: Files, base: str) -> None:
    """Refuse small files that cannot stand beside the weights, before anything is written.

    Args:
        files: what a user gives.
        base: what the files of weights are called, without suffix and number.

    Raises:
        ConfigError: a path that leads elsewhere, a name that the output needs itself, or content that is none.
    """
    taken = re.compile(rf"{re.escape(base)}(-\d+-of-\d+)?\.safetensors", re.IGNORECASE)
    for name, content in files.items():
        if not is_below(name):
            raise ConfigError(f"files: {name!r} is no name of a file in the directory of the output.")
        first = PurePath(name).parts[0]
        if taken.fullmatch(first) or first.lower() in (index_name(base).lower(), PROVENANCE):
            raise ConfigError(
                f"files: the name {name!r} is taken. The output itself writes {base}.safetensors or "
                f"{base}-00001-of-0000N.safetensors with {index_name(base)}, and {PROVENANCE}. Choose another name."
            )
        if not isinstance(content, bytes | Path):
            raise ConfigError(
                f"files: {name!r} is a {type(content).__name__}; give the content as bytes, or a pathlib.Path to copy."
            )


def is_below(name: object) -> bool:
    """Whether a name of `Files` is that of a file in the directory or below it."""
    if not isinstance(name, str) or "\0" in name:
        return False
    try:
        path = PurePath(os.fsdecode(os.fsencode(name)))
    except UnicodeError:
        return False
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts
