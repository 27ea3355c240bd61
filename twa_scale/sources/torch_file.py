"""Files of torch.save that hold a state dict."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from twa_scale.errors import CandidateError
from twa_scale.sources.archive import Archive, dense, is_tensor
from twa_scale.sources.entries import WeightsKey, flattened
from twa_scale.sources.handles import File
from twa_scale.sources.stored import Stored, StoredCandidate

# What torch.load(weights_only=True) knows too: none of it is a tensor, or `dense` refuses the tensor by its name.
_HARMLESS = {
    "_codecs.encode",
    "builtins.bytearray",
    "collections.Counter",
    "collections.defaultdict",
    "torch.Tensor",
    "torch.device",
    "torch.nn.parameter.Parameter",
    "torch.serialization._get_layout",
}
_TENSORS = "torch._utils._rebuild_"


class TorchFileCandidate(StoredCandidate):
    """One .pt, .pth or .bin file. Of its tensors, only the bytes of a slice are read."""

    def __init__(
        self, path: Path, directory: Path | None = None, label: str | None = None, keys: WeightsKey | None = None
    ) -> None:
        file = File(path)
        try:
            self._stored = _chosen(_content(file), keys or WeightsKey(), str(path))
            super().__init__(self._stored, [file], label or str(path), directory)
            self.file_name = path.name
        except BaseException:
            file.close()
            raise

    def mapped(self, name: str) -> torch.Tensor | None:
        """Return a view of a whole tensor in the mapped file, flattened; None where it is not aligned or not whole."""
        return self._stored[self.stored_names[name]].mapped()

    def stored_once(self, name: str, other: str) -> bool:
        """Whether two names stand for the same bytes."""
        first, second = (self._stored[self.stored_names[n]] for n in (name, other))
        return first.place == second.place


def _chosen(content: Mapping[Any, Any], keys: WeightsKey, label: str) -> dict[str, Stored]:
    try:
        entries = dict(flattened(content, is_tensor))
    except ValueError as error:
        raise CandidateError(f"{label}: {error}. Save only tensors: torch.save(model.state_dict(), path).") from error
    shapes = {path: value.shape if isinstance(value, Stored) else () for path, value in entries.items()}
    held = {name: entries[path] for name, path in keys.choose(shapes, label).items()}
    return dense(held, label, "Save a dense tensor in its place.")


def _content(file: File) -> Mapping[Any, Any]:
    magic = bytearray(min(8, file.size))
    file.read(memoryview(magic), 0, "the file")
    if magic == b"version ":
        raise CandidateError(f"{file.path}: is a Git LFS pointer, not the weights. Fetch them with `git lfs pull`.")
    if not magic.startswith(b"PK\x03\x04"):
        raise CandidateError(
            f"{file.path}: is not the zip archive that torch.save writes since torch 1.6, but a legacy file, a "
            "plain pickle or something else; it was refused and nothing in it was run. If you trust it, load "
            "it once and save its state dict again with torch.save or safetensors."
        )
    archive = Archive(file)
    content = archive.content()
    _refuse_objects(archive.foreign, file.path)
    if not isinstance(content, Mapping):
        raise CandidateError(
            f"{file.path}: holds {type(content).__name__}, not a dict of tensors. Save model.state_dict() there."
        )
    return content


def _refuse_objects(foreign: list[str], path: str) -> None:
    wants = next((name for name in foreign if name not in _HARMLESS and not name.startswith(_TENSORS)), None)
    if wants is None:
        return
    fix = "Save only tensors: torch.save(model.state_dict(), path)."
    if wants.startswith("torch.distributed"):
        fix = "It holds one rank's shards: save the model with torch.distributed.checkpoint.save, or with Snapshots."
    raise CandidateError(
        f"{path}: its pickle asks for {wants!r}, which could run code on loading; it was refused and nothing in it "
        f"was run. {fix}"
    )
