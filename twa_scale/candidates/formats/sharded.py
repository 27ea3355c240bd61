"""Several files that are one candidate, by a Hugging Face index."""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch

from twa_scale.base.inputs import MAX_JSON, brief, parse_json, read_bounded
from twa_scale.base.names import nearest, some
from twa_scale.candidates.candidate import Candidate
from twa_scale.candidates.mapped import Mappable
from twa_scale.candidates.wrapper_names import unwrapped
from twa_scale.errors import CandidateError


class ShardedCandidate:
    """The tensors that `index` names, each in its own file beside it."""

    def __init__(self, index: Path, open_file: Callable[[Path], Candidate], label: str) -> None:
        self.label = label
        self.directory: Path | None = index.parent
        self.file_name: str | None = index.name
        self.bytes_read = 0
        file_of = weight_map(index)
        missing = sorted({file for file in file_of.values() if not (index.parent / file).is_file()})
        if missing:
            raise CandidateError(
                f"{index}: names {some(missing)}, which {'is' if len(missing) == 1 else 'are'} not there. "
                "Every file of the index must lie beside it: copy the rest, or leave this candidate out."
            )
        self._parts: dict[str, Candidate] = {}
        try:
            for file in sorted(set(file_of.values())):
                self._parts[file] = open_file(index.parent / file)
            parts = [part.metadata.items() for part in self._parts.values()]
            self.metadata = dict(sorted(set(parts[0]).intersection(*parts[1:])))
            self.stored_names = unwrapped(file_of, str(index))
            # A part may lack names that the whole has, and so call the same tensor something else.
            names = {file: {raw: name for name, raw in part.stored_names.items()} for file, part in self._parts.items()}
            self._place_of = {
                name: self._place(raw, file_of[raw], names[file_of[raw]], index)
                for name, raw in self.stored_names.items()
            }
            for file, held in names.items():
                _refuse_unlisted(index, file, held, file_of)
        except BaseException:
            self.close()
            raise

    def _place(self, raw: str, file: str, names: Mapping[str, str], index: Path) -> tuple[Candidate, str]:
        """Return the file that holds a tensor, and what that calls it."""
        if raw not in names:
            raise CandidateError(
                f"{index.parent / file}: tensor {raw!r} is missing, which {index.name} says is here"
                f"{nearest(raw, names) or '.'} Files and index must be of one writing: write the "
                "candidate again."
            )
        return self._parts[file], names[raw]

    def names(self) -> list[str]:
        """Return the tensor names without wrappers, sorted."""
        return list(self._place_of)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor."""
        part, own = self._place_of[name]
        return part.shape(own)

    def dtype(self, name: str) -> torch.dtype:
        """Return the type in which `read` delivers a tensor."""
        part, own = self._place_of[name]
        return part.dtype(own)

    def read(self, name: str, start: int, out: torch.Tensor) -> None:
        """Fill `out` from the file that holds the tensor."""
        part, own = self._place_of[name]
        part.read(own, start, out)
        self.bytes_read += out.nbytes

    def mapped(self, name: str) -> torch.Tensor | None:
        """Return a view of a whole tensor, flattened, where its file offers one."""
        part, own = self._place_of[name]
        return part.mapped(own) if isinstance(part, Mappable) else None

    def close(self) -> None:
        """Close every file."""
        for part in self._parts.values():
            part.close()


def _refuse_unlisted(index: Path, file: str, held: Iterable[str], file_of: Mapping[str, str]) -> None:
    """Refuse a file with tensors that the index does not place in it: loaders would read these too, or others."""
    for raw in held:
        if file_of.get(raw) != file:
            where = f"places in {file_of[raw]!r}" if raw in file_of else "does not name"
            raise CandidateError(
                f"{index.parent / file}: holds tensor {raw!r}, which {index.name} {where}. Files and index must be of "
                "one writing: write the candidate again (from_pretrained, save_pretrained)."
            )


def weight_map(index: Path) -> dict[str, str]:
    """Return the file of each tensor that an index names.

    Raises:
        CandidateError: no index, or one that names something else than files beside it.
    """
    try:
        weight_map = parse_json(read_bounded(index, MAX_JSON))["weight_map"]
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
                f"{index}: tensor {name!r}: {brief(file)} must be the name of a file beside the index. Write the "
                "candidate again."
            )
        if file.endswith(".index.json"):
            raise CandidateError(
                f"{index}: tensor {name!r}: {brief(file)} is an index; an index names files of weights. Write the "
                "candidate again."
            )
    return weight_map
