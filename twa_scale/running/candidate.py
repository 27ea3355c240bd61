"""The snapshots of a window as candidates, which have names, shapes and dtypes, but no files."""

from collections.abc import Sequence
from pathlib import Path

import torch

from twa_scale.candidates import Candidate
from twa_scale.candidates.complex_tensors import in_pairs
from twa_scale.candidates.conversion import Conversion, Made
from twa_scale.engines import Engine
from twa_scale.output.model_card import SNAPSHOT_LABEL
from twa_scale.output.stored_form import StoredForm


class SnapshotCandidate:
    """One snapshot, with the metadata of the file that `RunningAverages.save` would write."""

    directory: Path | None = None
    file_name: str | None = None
    bytes_read = 0

    def __init__(self, engine: Engine, step: int, form: StoredForm) -> None:
        self.label = f"{SNAPSHOT_LABEL}{step}"
        self.metadata: dict[str, str] = {}
        pairs = engine.complex_names
        tensors = {info.name: (info.shape, info.dtype) for info in engine.parameters.values()}
        tensors |= {name: (tuple(buffer.shape), buffer.dtype) for name, buffer in engine.buffers().items()}
        self._tensors: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
        self.stored_names: dict[str, str] = {}
        for owner in form.tensors:
            shape, dtype = tensors[owner]
            stored, *others = form.stored_names(owner)
            for name, raw in ((owner, stored), *((raw, raw) for raw in others)):
                self._tensors[name] = (shape[:-1], dtype.to_complex()) if owner in pairs else (shape, dtype)
                self.stored_names[name] = raw
        self._form = form

    def names(self) -> list[str]:
        """Return the tensor names, sorted."""
        return sorted(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor."""
        return self._tensors[name][0]

    def dtype(self, name: str) -> torch.dtype:
        """Return the type of a tensor in the model."""
        return self._tensors[name][1]

    def read(self, name: str, start: int, out: torch.Tensor) -> None:
        """Raise an error, because the window is the store and nothing is read."""
        raise AssertionError(f"{self.label}: {name!r} [{start}:{start + len(out)}] is in the window")

    def made(self, name: str) -> Made | None:
        """Return the segments of the file from which a tensor would be made, or None if it is stored unchanged."""
        return self._form.made(name, self.shape(name))

    def conversion(self) -> Conversion | None:
        """Return None, because no file is converted."""
        return None

    def close(self) -> None:
        """Do nothing, because the window remains in use."""


def snapshot_candidates(engine: Engine, steps: Sequence[int], form: StoredForm) -> list[Candidate]:
    """Return the snapshots of `steps` as candidates in a form of files. Complex tensors are pairs of real numbers."""
    return [in_pairs(SnapshotCandidate(engine, step, form)) for step in steps]
