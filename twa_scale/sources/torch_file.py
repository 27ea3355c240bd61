"""Files of torch.save: unpickled by torch's restricted reader only, tensor data mapped and read by slices."""

import os
import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from twa_scale.errors import CandidateError
from twa_scale.inputs import open_regular
from twa_scale.sources.entries import WeightsKey
from twa_scale.sources.memory import MemoryCandidate


class TorchFileCandidate(MemoryCandidate):
    """One .pt, .pth or .bin file. It is mapped: only the pages of a slice are read."""

    def __init__(
        self, path: Path, directory: Path | None = None, label: str | None = None, keys: WeightsKey | None = None
    ) -> None:
        content = _load(path)
        if not isinstance(content, Mapping):
            raise CandidateError(
                f"{path}: holds {type(content).__name__}, not a dict of tensors. Save model.state_dict() there."
            )
        super().__init__(content, label or str(path), directory, keys)
        self._path, self._size = path, path.stat().st_size

    def read(self, name: str, start: int, out: torch.Tensor) -> None:
        """Fill `out` with the elements from `start` on, in row-major order."""
        # A page beyond the end of a mapped file kills the process instead of raising: look before every read.
        try:
            size = self._path.stat().st_size
        except OSError as error:
            raise CandidateError(f"{self._path}: tensor {name!r} cannot be read: {error.strerror}.") from error
        if size != self._size:
            raise CandidateError(
                f"{self._path}: tensor {name!r} cannot be read: the file had {self._size} bytes when it was "
                f"opened and has {size} now; candidates must stay as they are until the run has ended."
            )
        super().read(name, start, out)


def _load(path: Path) -> Any:
    try:
        with os.fdopen(open_regular(path), "rb") as file:
            magic = file.read(8)
    except OSError as error:
        raise CandidateError(f"{path}: cannot be opened: {error.strerror}.") from error
    if magic == b"version ":
        raise CandidateError(f"{path}: is a Git LFS pointer, not the weights. Fetch them with `git lfs pull`.")
    if not magic.startswith(b"PK\x03\x04"):
        raise CandidateError(
            f"{path}: is not the zip archive that torch.save writes since torch 1.6, but a legacy file, a "
            "plain pickle or something else; it was refused and nothing in it was run. If you trust it, load "
            "it once and save its state dict again with torch.save or safetensors."
        )
    if not zipfile.is_zipfile(path):
        raise CandidateError(
            f"{path}: the archive has no end: it is truncated. Copy it again, or leave this candidate out."
        )
    try:
        return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL (\S+)", str(error))
        wants = found.group(1).rstrip(",;") if found else "more than tensors"
        fix = "Save only tensors: torch.save(model.state_dict(), path)."
        if wants.startswith("torch.distributed"):
            fix = (
                "It holds one rank's shards: save the model with torch.distributed.checkpoint.save, or with Snapshots."
            )
        raise CandidateError(
            f"{path}: its pickle asks for {wants!r}, which could run code on loading; it was refused and nothing in it "
            f"was run. {fix}"
        ) from error
    except Exception as error:
        # A damaged archive makes torch raise RuntimeError, KeyError, EOFError and more.
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CandidateError(f"{path}: is damaged: {reason}. Copy it again, or leave this candidate out.") from error
