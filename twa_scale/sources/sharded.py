"""Several files that are one candidate, by a Hugging Face index."""

import json
from collections.abc import Callable
from pathlib import Path

import torch

from twa_scale.errors import CandidateError
from twa_scale.names import nearest, some
from twa_scale.sources.mapped import Mappable
from twa_scale.sources.protocol import Candidate
from twa_scale.sources.unwrapped import unwrapped


class ShardedCandidate:
    """The tensors that `index` names, each in its own file beside it."""

    def __init__(self, index: Path, open_file: Callable[[Path], Candidate], label: str) -> None:
        self.label = label
        self.directory: Path | None = index.parent
        self.bytes_read = 0
        file_of = _weight_map(index)
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
            raw_of = unwrapped(file_of, str(index))
            self._part_of = {name: self._holder(name, file_of[raw], index) for name, raw in raw_of.items()}
        except BaseException:
            self.close()
            raise

    def _holder(self, name: str, file: str, index: Path) -> Candidate:
        part = self._parts[file]
        if name not in part.names():
            raise CandidateError(
                f"{index.parent / file}: tensor {name!r} is missing, which {index.name} says is here"
                f"{nearest(name, part.names()) or '.'} Files and index must be of one writing: write the "
                "candidate again."
            )
        return part

    def names(self) -> list[str]:
        """Return the normalized tensor names, sorted."""
        return list(self._part_of)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor."""
        return self._part_of[name].shape(name)

    def dtype(self, name: str) -> torch.dtype:
        """Return the type in which `read` delivers a tensor."""
        return self._part_of[name].dtype(name)

    def read(self, name: str, start: int, out: torch.Tensor) -> None:
        """Fill `out` from the file that holds the tensor."""
        self._part_of[name].read(name, start, out)
        self.bytes_read += out.nbytes

    def mapped(self, name: str) -> torch.Tensor | None:
        """Return a view of a whole tensor, flattened, where its file offers one."""
        part = self._part_of[name]
        return part.mapped(name) if isinstance(part, Mappable) else None

    def close(self) -> None:
        """Close every file."""
        for part in self._parts.values():
            part.close()


def _weight_map(index: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(index.read_bytes())["weight_map"]
    except OSError as error:
        raise CandidateError(f"{index}: cannot be read: {error.strerror}.") from error
    except (ValueError, KeyError, TypeError) as error:
        raise CandidateError(
            f"{index}: is not a Hugging Face index, which is JSON with a 'weight_map': {error!r}."
        ) from error
    if not isinstance(weight_map, dict) or not weight_map:
        raise CandidateError(f"{index}: its 'weight_map' must map tensor names to files; it is {weight_map!r}.")
    for name, file in weight_map.items():
        if not isinstance(file, str) or Path(file).name != file:
            raise CandidateError(f"{index}: tensor {name!r}: {file!r} must be the name of a file beside the index.")
    return weight_map
