"""Candidates in several files with a Hugging Face index."""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch

from twa_scale.base.inputs import MAX_JSON, brief, parse_json, read_bounded
from twa_scale.base.names import nearest, quoted
from twa_scale.base.urls import Url
from twa_scale.candidates.candidate import Candidate
from twa_scale.candidates.formats.origin import Origin, origin_of
from twa_scale.candidates.mapped import Mappable
from twa_scale.candidates.wrapper_names import unwrapped
from twa_scale.errors import CandidateError


class ShardedCandidate:
    """A candidate whose tensors are in several files, listed by a Hugging Face index.

    Args:
        index: the index file; the files of weights are in the same directory.
        open_file: opens one file of weights.
        label: the name of the candidate in messages.

    Raises:
        CandidateError: the index is not valid, or a file does not match it.
    """

    def __init__(self, index: Path | Url, open_file: Callable[[Path | Url], Candidate], label: str) -> None:
        self.label = label
        self.directory: Path | None = index.parent if isinstance(index, Path) else None
        self.file_name: str | None = index.name
        self.bytes_read = 0
        file_of = weight_map(index)
        missing = sorted({file for file in file_of.values() if not (index.parent / file).is_file()})
        if missing:
            raise CandidateError(
                f"{index}: names {quoted(missing)}, which {'is' if len(missing) == 1 else 'are'} not there. "
                "All files of the index must be in its directory: copy the rest, or leave this candidate out."
            )
        self._parts: dict[str, Candidate] = {}
        try:
            for file in sorted(set(file_of.values())):
                self._parts[file] = open_file(index.parent / file)
            parts = [part.metadata.items() for part in self._parts.values()]
            self.metadata = dict(sorted(set(parts[0]).intersection(*parts[1:])))
            self.stored_names = unwrapped(file_of, str(index))
            origins = list(map(origin_of, self._parts.values()))
            keys = {path: file_keys for origin in origins for path, file_keys in origin.keys.items()}
            versions = {path: version for origin in origins for path, version in origin.versions.items()}
            self.origin = Origin(f"several files, {origins[0].description} each", origins[0].written_as, keys, versions)
            # Which prefixes count as wrappers depends on all names, so a part may use another name for a tensor.
            names = {file: {raw: name for name, raw in part.stored_names.items()} for file, part in self._parts.items()}
            self._part_of = {
                name: self._locate(raw, file_of[raw], names[file_of[raw]], index)
                for name, raw in self.stored_names.items()
            }
            for file, file_keys in names.items():
                _refuse_unlisted(index, file, file_keys, file_of)
        except BaseException:
            self.close()
            raise

    def _locate(self, raw: str, file: str, names: Mapping[str, str], index: Path | Url) -> tuple[Candidate, str]:
        """Return the part that holds a tensor, and the name of the tensor in that part."""
        if raw not in names:
            raise CandidateError(
                f"{index.parent / file}: tensor {raw!r} is missing, which {index.name} lists in this file"
                f"{nearest(raw, names) or '.'} Files and index must come from the same save: write the candidate "
                "again."
            )
        return self._parts[file], names[raw]

    def names(self) -> list[str]:
        """Return the tensor names without the prefixes of wrappers, sorted."""
        return list(self._part_of)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor."""
        part, stored_name = self._part_of[name]
        return part.shape(stored_name)

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype of a tensor, which is that of the tensors given to `read`."""
        part, stored_name = self._part_of[name]
        return part.dtype(stored_name)

    def read(self, name: str, start: int, out: torch.Tensor) -> None:
        """Fill `out` with the elements that begin at `start`, from the file that holds the tensor."""
        part, stored_name = self._part_of[name]
        part.read(stored_name, start, out)
        self.bytes_read += out.nbytes

    def mapped(self, name: str) -> torch.Tensor | None:
        """Return a flat view of a whole tensor in the mapped file, or None if its file has none."""
        part, stored_name = self._part_of[name]
        return part.mapped(stored_name) if isinstance(part, Mappable) else None

    def close(self) -> None:
        """Close all files."""
        for part in self._parts.values():
            part.close()


def _refuse_unlisted(index: Path | Url, file: str, stored: Iterable[str], file_of: Mapping[str, str]) -> None:
    """Check that the index lists all tensors of a file. Loaders differ in what they do with unlisted tensors."""
    for raw in stored:
        if file_of.get(raw) != file:
            problem = f"places in {file_of[raw]!r}" if raw in file_of else "does not name"
            raise CandidateError(
                f"{index.parent / file}: holds tensor {raw!r}, which {index.name} {problem}. Files and index must come "
                "from the same save: write the candidate again (from_pretrained, save_pretrained)."
            )


def _content(index: Path | Url) -> bytes:
    return index.read_bounded(MAX_JSON) if isinstance(index, Url) else read_bounded(index, MAX_JSON)


def weight_map(index: Path | Url) -> dict[str, str]:
    """Return the file name of each tensor in an index.

    Raises:
        CandidateError: the file is not an index, or it names files outside its directory.
    """
    try:
        weight_map = parse_json(_content(index))["weight_map"]
    except (ValueError, KeyError, TypeError) as error:
        raise CandidateError(
            f"{index}: is not a Hugging Face index, which is JSON with a 'weight_map' "
            f"({type(error).__name__}: {error}). Copy it again, or leave this candidate out."
        ) from error
    if not isinstance(weight_map, dict) or not weight_map:
        raise CandidateError(f"{index}: its 'weight_map' must map tensor names to files; it is {brief(weight_map)}.")
    for name, file in weight_map.items():
        if not isinstance(file, str) or Path(file).name != file:
            raise CandidateError(
                f"{index}: tensor {name!r}: {brief(file)} must be the name of a file in the directory of the index. "
                "Write the candidate again."
            )
        if file.endswith(".index.json"):
            raise CandidateError(
                f"{index}: tensor {name!r}: {brief(file)} is an index, but an index must name files of weights. Write "
                "the candidate again."
            )
    return weight_map
