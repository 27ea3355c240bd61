"""Candidates in files that torch.save wrote."""

import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from twa_scale.candidates.entries import flattened
from twa_scale.candidates.formats.file_handles import File
from twa_scale.candidates.formats.origin import Keys, Origin
from twa_scale.candidates.formats.pickle_stubs import PickleStub, nested_values
from twa_scale.candidates.formats.stored_tensors import Record, Stored, StoredCandidate
from twa_scale.candidates.formats.torch_archive import Archive, dense_tensors, is_tensor
from twa_scale.candidates.other_formats import format_of
from twa_scale.candidates.weights_key import StateObject, WeightsKey
from twa_scale.errors import CandidateError

# Names that a malicious pickle calls. Here nothing is called, but Python's unpickler would run them.
_UNSAFE_CONTENT = re.compile(
    r"(os|posix|nt|pty|sys|subprocess|shutil|socket|runpy|importlib|ctypes|webbrowser)\..*"
    r"|builtins\.(exec|eval|compile|open|__import__)"
)
_TENSORS = re.compile(r"torch\.(.+\.)?(Uninitialized)?(Parameter|Buffer|Tensor)")
_ARRAYS = re.compile(r"numpy\.(ndarray|.*\._frombuffer)")
_MAX_VALUES = 10_000_000  # values inside objects; a value that several objects share counts for each


class TorchFileCandidate(StoredCandidate):
    """A candidate in one .pt, .pth or .bin file. A read transfers only the bytes of its slice."""

    def __init__(
        self, path: Path, directory: Path | None = None, label: str | None = None, keys: WeightsKey | None = None
    ) -> None:
        file = File(path)
        try:
            self._stored, chosen = _chosen(_content(file), keys or WeightsKey(), str(path))
            origin = Origin("a file of torch.save", "pt", {path: chosen}, {path: file.version})
            super().__init__(self._stored, [file], label or str(path), directory, origin)
            self.file_name = path.name
        except BaseException:
            file.close()
            raise

    def mapped(self, name: str) -> torch.Tensor | None:
        """Return a flat view of a tensor in the mapped file, or None if it is not aligned or not row-major."""
        return self._stored[self.stored_names[name]].mapped()

    def stored_once(self, name: str, other: str) -> bool:
        """Return whether two names refer to the same bytes."""
        first, second = (self._stored[self.stored_names[n]] for n in (name, other))
        return first.memory_key == second.memory_key


def tensors_in(path: Path) -> dict[Keys, Stored]:
    """Return all dense tensors of a file that torch.save wrote, by their paths of keys."""
    file = File(path)
    try:
        entries = _entries(_content(file))
    finally:
        file.close()  # a read opens it again
    return {keys: value for keys, value in entries.items() if isinstance(value, Stored)}


def _entries(content: Mapping[Any, Any]) -> dict[Keys, Any]:
    return flattened(content, lambda value: isinstance(value, Stored | PickleStub | Record), is_tensor)


def _chosen(content: Mapping[Any, Any], keys: WeightsKey, label: str) -> tuple[dict[str, Stored], dict[str, Keys]]:
    """Return the weights of a file and their paths of keys, by name."""
    try:
        entries = _entries(content)
        tensors = {path: value for path, value in entries.items() if is_tensor(value)}
        objects = _objects({path: value for path, value in entries.items() if not is_tensor(value)})
    except ValueError as error:
        raise CandidateError(f"{label}: {error}. Save only tensors: torch.save(model.state_dict(), path).") from error
    shapes = {path: value.shape if isinstance(value, Stored) else () for path, value in tensors.items()}
    chosen = keys.choose(shapes, label, objects)
    weights = {name: tensors[path] for name, path in chosen.items()}
    return dense_tensors(weights, label, "Save a dense tensor in its place."), chosen


def _objects(stubs: Mapping[Keys, PickleStub | Record]) -> dict[Keys, StateObject]:
    """Return the objects that hold tensors or are arrays, and so may hold a weight."""
    seen, objects = 0, {}
    for path, value in stubs.items():
        if isinstance(value, Record) or _TENSORS.fullmatch(value.class_name):
            kind = "torch.storage.UntypedStorage" if isinstance(value, Record) else value.class_name
            objects[path] = StateObject(kind, Counter([()]))
            continue
        shapes: Counter[tuple[int, ...]] = Counter()
        for inner in nested_values(value):
            seen += 1
            if seen > _MAX_VALUES:
                raise ValueError(f"its objects hold more than {_MAX_VALUES} values")
            if is_tensor(inner):
                shapes[inner.shape if isinstance(inner, Stored) else ()] += 1
        if shapes or _ARRAYS.fullmatch(value.class_name):
            objects[path] = StateObject(value.class_name, shapes)
    return objects


def shapes_in(path: Path) -> dict[Keys, tuple[int, ...]]:
    """Return the shapes of all dense tensors that torch.save wrote into a file, by their paths of keys.

    Raises:
        CandidateError: the file cannot be read.
    """
    file = File(path)
    try:
        content = _loaded(file)
    finally:
        file.close()
    try:
        entries = _entries(content if isinstance(content, Mapping) else {"": content})
    except ValueError as error:
        raise CandidateError(f"{path}: {error}.") from error
    return {keys: value.shape for keys, value in entries.items() if isinstance(value, Stored)}


def _content(file: File) -> Mapping[Any, Any]:
    content = _loaded(file)
    if not isinstance(content, Mapping):
        kind = type(content).__name__
        if isinstance(content, PickleStub):
            kind = f"an object of class {content.class_name}"
        elif isinstance(content, Stored | Record):
            kind = "a single tensor"
        raise CandidateError(f"{file.path}: holds {kind}, not a dict of tensors. Save model.state_dict() there.")
    return content


def _loaded(file: File) -> Any:
    head = bytearray(min(16, file.size))
    file.read(memoryview(head), 0, "the file")
    if not head.startswith(b"PK\x03\x04"):
        if format_name := format_of(head, file.size, safetensors=False):
            raise CandidateError(f"{file.path}: {format_name}")
        raise CandidateError(
            f"{file.path}: is not a zip archive, which torch.save writes since torch 1.6, but a legacy file, a plain "
            "pickle or something else; it was refused and nothing in it was run. If you trust it, load it once and "
            "save its state dict again with torch.save or safetensors."
        )
    archive = Archive(file)
    content = archive.content()
    if attack := next((name for name in archive.unresolved if _UNSAFE_CONTENT.fullmatch(name)), None):
        raise CandidateError(
            f"{file.path}: its pickle calls {attack!r}, which can run any code; it was refused and nothing in it was "
            "run. No checkpoint needs this call: do not load the file elsewhere."
        )
    return content
