"""Checks before a directory is replaced: it may hold only an earlier output of this program."""

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from twa_scale.base.inputs import MAX_JSON, parse_json, read_bounded
from twa_scale.candidates.formats.file_handles import File
from twa_scale.candidates.formats.safetensors import read_header
from twa_scale.errors import CandidateError, OutputError
from twa_scale.output.provenance import PROVENANCE, PROVENANCE_KEY, SIGNATURES
from twa_scale.output.signatures import signature
from twa_scale.output.small_files import is_below

_MAX_NAMES = 4  # names in a message
_INDEX = ".safetensors.index.json"


def check_replaceable(target: Path, overwrite: bool) -> None:
    """Check that a directory may be replaced by an output.

    Args:
        target: the directory.
        overwrite: whether an earlier output may be replaced.

    Raises:
        OutputError: the directory is not empty, and `overwrite` is False or it holds other files than those of one
            earlier output. The message names these files.
    """
    if not any(target.iterdir()):
        return
    if not overwrite:
        raise OutputError(
            f"{target}: exists and is not empty; it was not changed. Choose another name, remove it, or use "
            "--overwrite (overwrite=True)."
        )
    weights = own_weight_files(target)
    foreign = foreign_files(target, weights)
    if not foreign and weights:
        return
    more = f" and {len(foreign) - _MAX_NAMES} more" if len(foreign) > _MAX_NAMES else ""
    reasons = [", ".join(foreign[:_MAX_NAMES]) + more] if foreign else []
    reasons += [] if weights else ["no weights that twa_scale has written"]
    raise OutputError(
        f"{target}: holds {' and holds '.join(reasons)}. --overwrite replaces only a whole earlier output; other files "
        "would be lost. Choose another name, or move or remove these files yourself."
    )


def own_weight_files(directory: Path, wrote: str | None = None) -> set[str]:
    """Return the names of the weight files in a directory that this program wrote, according to their headers.

    Args:
        directory: a directory.
        wrote: if given, only files whose provenance has this "wrote" entry are returned.
    """
    origins = {path.name: _origin(path) for path in directory.glob("*.safetensors")}
    own_names = {
        name for name, origin in origins.items() if origin is not None and wrote in (None, origin.get("wrote"))
    }
    return own_names if wrote else own_names | _signed(directory)


def _signed(directory: Path) -> set[str]:
    """Return the names of the weight files whose signatures are in twa_scale.json."""
    signatures = _json(directory / PROVENANCE, SIGNATURES)
    if not isinstance(signatures, dict):
        return set()
    files = {str(name): directory / str(name) for name in signatures if is_below(name)}
    return {name for name, path in files.items() if path.is_file() and signature(path) == signatures[name]}


def foreign_files(directory: Path, weights: Collection[str]) -> list[str]:
    """Return the files and directories that are not part of an output of this program, as text for messages.

    Args:
        directory: a directory.
        weights: its `own_weight_files`.
    """
    own_paths = {directory / name for name in weights} | _side_files(directory)
    own_paths |= {path for path in directory.glob(f"*{_INDEX}") if _names_only(path, weights)}
    return list(_foreign_in(directory, own_paths, {folder for path in own_paths for folder in path.parents}, directory))


def _foreign_in(folder: Path, own_paths: Collection[Path], folders: Collection[Path], root: Path) -> Iterator[str]:
    for path in sorted(folder.iterdir()):
        name = repr(str(path.relative_to(root)))
        if path.is_dir() and not path.is_symlink():
            if path in folders:
                yield from _foreign_in(path, own_paths, folders, root)
            else:
                yield f"the directory {name}"
        elif path not in own_paths:
            yield name


def _origin(path: Path) -> dict[str, Any] | None:
    """Return the provenance in the header of a file; None if another program wrote it."""
    try:
        file = File(path)
        try:
            origin = parse_json(read_header(file)[1][PROVENANCE_KEY].encode())
        finally:
            file.close()
    except (CandidateError, OSError, KeyError, ValueError):
        return None
    return origin if isinstance(origin, dict) else None


def _side_files(directory: Path) -> set[Path]:
    """Return the files that twa_scale.json of an output lists, and this file itself."""
    names = _json(directory / PROVENANCE, "files")
    return {directory / name for name in (PROVENANCE, *names)} if isinstance(names, list) else set()


def _names_only(index: Path, weights: Collection[str]) -> bool:
    """Return whether an index names only these weight files."""
    files = _json(index, "weight_map")
    return isinstance(files, dict) and bool(files) and set(map(str, files.values())) <= set(weights)


def _json(path: Path, key: str) -> object:
    """Return the value of a key of a JSON file; None if it cannot be read."""
    try:
        value: object = parse_json(read_bounded(path, MAX_JSON))[key]
    except (CandidateError, ValueError, TypeError, KeyError):
        return None
    return [str(name) for name in value] if isinstance(value, list) else value
