"""What stands where an output is to be written: an earlier output of this program, or something that would be lost."""

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from twa_scale.base.inputs import MAX_JSON, parse_json, read_bounded
from twa_scale.candidates.formats.file_handles import File
from twa_scale.candidates.formats.safetensors import read_header
from twa_scale.errors import CandidateError, OutputError
from twa_scale.output.provenance import MARK, PROVENANCE

_LIMIT = 4  # names in a message
_INDEX = ".safetensors.index.json"


def check_replaceable(target: Path, overwrite: bool) -> None:
    """Refuse a directory whose content must not be replaced by an output.

    Raises:
        OutputError: a directory that is not empty, without `overwrite`; or one that holds anything else than one
            earlier output. Names what would be lost.
    """
    if not any(target.iterdir()):
        return
    if not overwrite:
        raise OutputError(
            f"{target}: exists and is not empty; it is left alone. Choose another name, remove it, or give "
            "--overwrite (overwrite=True)."
        )
    weights = marked_weights(target)
    found = foreign(target, weights)
    if not found and weights:
        return
    more = f" and {len(found) - _LIMIT} more" if len(found) > _LIMIT else ""
    held = [", ".join(found[:_LIMIT]) + more] if found else []
    held += [] if weights else ["no weights that twa_scale has written"]
    raise OutputError(
        f"{target}: holds {' and holds '.join(held)}. Only an earlier output is overwritten, and only as a whole; what "
        "is not part of it would be lost. Choose another name, or move or remove what is there yourself."
    )


def marked_weights(directory: Path, wrote: str | None = None) -> set[str]:
    """Return the names of the files of weights in a directory whose headers say that this program wrote them.

    Args:
        directory: where an output may be.
        wrote: what their `provenance` has to say was written, if it has to.
    """
    marks = {path.name: _mark(path) for path in directory.glob("*.safetensors")}
    return {name for name, mark in marks.items() if mark is not None and wrote in (None, mark.get("wrote"))}


def foreign(directory: Path, weights: Collection[str]) -> list[str]:
    """Return what in a directory is not part of an output of this program, as messages name it.

    Args:
        directory: where an output may be.
        weights: its `marked_weights`.
    """
    own = {directory / name for name in weights} | _side_files(directory)
    own |= {path for path in directory.glob(f"*{_INDEX}") if _names_only(path, weights)}
    return list(_unknown(directory, own, {folder for path in own for folder in path.parents}, directory))


def _unknown(folder: Path, own: Collection[Path], folders: Collection[Path], root: Path) -> Iterator[str]:
    for path in sorted(folder.iterdir()):
        name = repr(str(path.relative_to(root)))
        if path.is_dir() and not path.is_symlink():
            if path in folders:
                yield from _unknown(path, own, folders, root)
            else:
                yield f"the directory {name}"
        elif path not in own:
            yield name


def _mark(path: Path) -> dict[str, Any] | None:
    """Return what the header of a file says of its origin; None where another program wrote it."""
    try:
        file = File(path)
        try:
            said = parse_json(read_header(file)[1][MARK].encode())
        finally:
            file.close()
    except (CandidateError, OSError, KeyError, ValueError):
        return None
    return said if isinstance(said, dict) else None


def _side_files(directory: Path) -> set[Path]:
    """Return the side files that an output names itself, with the file that names them."""
    names = _json(directory / PROVENANCE, "files")
    return {directory / name for name in (PROVENANCE, *names)} if isinstance(names, list) else set()


def _names_only(index: Path, weights: Collection[str]) -> bool:
    """Whether an index is that of these files of weights."""
    places = _json(index, "weight_map")
    return isinstance(places, dict) and bool(places) and set(map(str, places.values())) <= set(weights)


def _json(path: Path, key: str) -> object:
    """Return the value of a key of a JSON file; None where there is none."""
    try:
        value: object = parse_json(read_bounded(path, MAX_JSON))[key]
    except (CandidateError, ValueError, TypeError, KeyError):
        return None
    return [str(name) for name in value] if isinstance(value, list) else value
