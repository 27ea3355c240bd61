"""Small files next to the weights of an output, such as config.json."""

import os
import re
from collections.abc import Mapping
from pathlib import Path, PurePath

from twa_scale.candidates.adapters import ADAPTER_BASE
from twa_scale.candidates.carry_over import BASE
from twa_scale.errors import ConfigError
from twa_scale.output.file_layout import index_name
from twa_scale.output.provenance import PROVENANCE

BASES = (BASE, ADAPTER_BASE)
"""The names of weight files without suffix and number."""
Files = Mapping[str, bytes | Path]
"""Small files next to the weights: the content of each, or the path of a file to copy, by its path in the output."""


def check_files(files: Files) -> None:
    """Check the names and contents of small files.

    Args:
        files: the files of a user.

    Raises:
        ConfigError: a path outside the output, a name that the output itself uses, or content that is neither bytes
            nor a path.
    """
    taken = re.compile(rf"({'|'.join(BASES)})(-\d+-of-\d+)?\.safetensors(\.index\.json)?", re.IGNORECASE)
    for name, content in files.items():
        if not is_below(name):
            raise ConfigError(f"files: {name!r} is not the name of a file inside the output directory.")
        first = PurePath(name).parts[0]
        if taken.fullmatch(first) or first.lower() == PROVENANCE:
            raise ConfigError(
                f"files: the name {name!r} is taken. The output itself writes {BASE}.safetensors or "
                f"{BASE}-00001-of-0000N.safetensors with {index_name(BASE)}, or {ADAPTER_BASE}.safetensors, and "
                f"{PROVENANCE}. Choose another name."
            )
        if not isinstance(content, bytes | Path):
            raise ConfigError(
                f"files: {name!r} is a {type(content).__name__}; give the content as bytes, or a pathlib.Path to copy."
            )


def is_below(name: object) -> bool:
    """Return whether `name` is a relative path that stays inside the output directory."""
    if not isinstance(name, str) or "\0" in name:
        return False
    try:
        path = PurePath(os.fsdecode(os.fsencode(name)))
    except UnicodeError:
        return False
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts
