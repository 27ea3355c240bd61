"""Candidates from state dicts in memory."""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.nn.parameter import is_lazy

from twa_scale.candidates.entries import flattened
from twa_scale.candidates.formats.flat_slices import copy_flat
from twa_scale.candidates.weights_key import StateObject, WeightsKey
from twa_scale.candidates.wrapper_names import unwrapped
from twa_scale.errors import CandidateError


class MemoryCandidate:
    """A state dict in memory. Its tensors, on any device and with any strides, are not copied.

    Clone tensors that training continues to change.
    """

    def __init__(
        self,
        state_dict: Mapping[str, Any],
        label: str,
        directory: Path | None = None,
        keys: WeightsKey | None = None,
    ) -> None:
        try:
            entries = flattened(state_dict, lambda value: _is_tensor(value) or _is_array(value), _is_tensor)
        except ValueError as error:
            raise CandidateError(f"{label}: {error}. Give the state dict of the model alone.") from error
        arrays = {path: StateObject(_kind(value), Counter()) for path, value in entries.items() if _is_array(value)}
        shapes = {
            path: () if value.is_nested or is_lazy(value) else tuple(value.shape)
            for path, value in entries.items()
            if path not in arrays
        }
        tensors = {name: entries[path] for name, path in (keys or WeightsKey()).choose(shapes, label, arrays).items()}
        self.label = label
        self.directory = directory
        self.file_name: str | None = None
        self.metadata: dict[str, str] = {}
        self.bytes_read = 0
        self.stored_names = unwrapped(tensors, label)
        for name, raw in self.stored_names.items():
            _refuse_unreadable(tensors[raw], name, label)
        self._tensors: dict[str, torch.Tensor] = {
            name: tensors[raw].detach() for name, raw in self.stored_names.items()
        }

    def names(self) -> list[str]:
        """Return the tensor names without the prefixes of wrappers, sorted."""
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor."""
        return tuple(self._tensors[name].shape)

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype of a tensor, which is that of the tensors given to `read`."""
        return self._tensors[name].dtype

    def read(self, name: str, start: int, out: torch.Tensor) -> None:
        """Fill `out` with the elements that begin at `start`, in row-major order."""
        copy_flat(self._tensors[name], start, out)
        self.bytes_read += out.nbytes

    def mapped(self, name: str) -> torch.Tensor | None:
        """Return a flat view of a whole tensor, or None if it is not contiguous in CPU memory."""
        tensor = self._tensors[name]
        return tensor.view(-1) if tensor.device.type == "cpu" and tensor.is_contiguous() else None

    def stored_once(self, name: str, other: str) -> bool:
        """Return whether two names refer to the same memory."""
        return _memory_key(self._tensors[name]) == _memory_key(self._tensors[other])

    @property
    def memory_keys(self) -> dict[str, object]:
        """For each tensor, a value that identifies its memory."""
        return {name: _memory_key(tensor) for name, tensor in self._tensors.items()}

    def close(self) -> None:
        """Drop the references to the tensors."""
        self._tensors = {}


def _is_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor)


def _is_array(value: Any) -> bool:
    """Return whether a value is an array of another library, which may be a weight. Numpy scalars are not."""
    return hasattr(value, "__array__") and not isinstance(value, torch.Tensor) and bool(getattr(value, "shape", ()))


def _kind(value: Any) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}"


def _memory_key(tensor: torch.Tensor) -> object:
    return tensor.device, tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride()


def _refuse_unreadable(tensor: torch.Tensor, name: str, label: str) -> None:
    if is_lazy(tensor):
        problem = "uninitialized, as lazy modules begin. Run one forward pass of the model before its state_dict()"
    elif isinstance(tensor, DTensor):
        problem = "a DTensor, which holds only this rank's part. Save it with twa_scale.Snapshots and give the paths"
    elif tensor.is_nested:
        problem = "a nested tensor, whose rows differ in length. Give a dense tensor"
    elif tensor.is_meta:
        problem = "on the meta device, which has no values. Give a materialized tensor"
    elif tensor.layout != torch.strided:
        problem = f"stored as {tensor.layout}, which has no row-major slices. Give a dense tensor"
    elif tensor.is_quantized:
        problem = "quantized. Give the floating point weights"
    else:
        return
    raise CandidateError(f"{label}: tensor {name!r} is {problem}.")
