"""Pickles of checkpoints, read without importing or running anything that they name."""

import pickle
from collections import OrderedDict
from collections.abc import Callable
from typing import IO, Any, cast

import torch

_STORAGES: dict[str, torch.dtype] = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "UntypedStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "ComplexFloatStorage": torch.complex64,
    "ComplexDoubleStorage": torch.complex128,
}


class Opaque:
    """Stands for an object of a class that was not imported.

    What the pickle says of its state are its attributes, or `state` if that is no dict.
    """

    state: Any = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass  # having one lets object.__new__ accept whatever the real class would

    def __call__(self, *args: Any, **kwargs: Any) -> "Opaque":
        """Do nothing in place of whatever it is."""
        return Opaque()

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.__dict__ = state
        else:
            self.state = state

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def __getattr__(self, name: str) -> Any:
        """Return None for what the state lacks, as versions differ."""
        if name.startswith("__"):
            raise AttributeError(name)

    @property
    def kind(self) -> str:
        """The name of the class or function that it stands for."""
        return f"{type(self).__module__}.{type(self).__qualname__}"

    def append(self, value: Any) -> None:
        """Take an item of what was a list."""

    def extend(self, values: Any) -> None:
        """Take items of what was a list."""

    def add(self, value: Any) -> None:
        """Take an item of what was a set."""


class SafeUnpickler(pickle.Unpickler):
    """Builds containers, numbers and tensors, and `Opaque` objects in place of everything else.

    The classes and functions that a pickle names are never looked up, so nothing that it asks for can run: a checkpoint
    that carries somebody's own objects can be read without trusting it.

    Args:
        file: the pickle.
        record: called with what `persistent_id` of torch.save says of a storage: (dtype, key, number of elements).
        tensor: called with such a record, the offset of the first element in it, shape, stride, and a dtype if it is
            not the record's.
    """

    def __init__(
        self,
        file: IO[bytes],
        record: Callable[[torch.dtype, str, int], Any] | None = None,
        tensor: Callable[..., Any] | None = None,
    ) -> None:
        super().__init__(file)
        self._record = record
        self._known: dict[tuple[str, str], Any] = {
            ("collections", "OrderedDict"): OrderedDict,
            ("builtins", "set"): set,
            ("torch", "Size"): torch.Size,
            ("torch._utils", "_rebuild_parameter"): _first,
            ("torch._utils", "_rebuild_parameter_with_state"): _first,
            ("torch._tensor", "_rebuild_from_type_v2"): _from_type,
        }
        if tensor:
            self._known["torch._utils", "_rebuild_tensor_v2"] = lambda *args: tensor(*args[:4])
            self._known["torch._utils", "_rebuild_tensor_v3"] = lambda *args: tensor(*args[:4], args[6])

    def find_class(self, module: str, name: str) -> Any:
        """Return what stands for `module.name`."""
        module = "builtins" if module == "__builtin__" else module  # its name in Python 2, which protocol 2 keeps
        if module in ("torch", "torch.storage"):
            if name in _STORAGES:
                return _STORAGES[name]
            if isinstance(dtype := getattr(torch, name, None), torch.dtype):
                return dtype
        if name == "ZeroStageEnum":  # of DeepSpeed, whose versions keep it in several places
            return int
        key = (module, name)
        if key not in self._known:
            self._known[key] = type(name, (Opaque,), {"__module__": module})
        return self._known[key]

    def persistent_load(self, pid: Any) -> Any:
        """Return what stands for a storage."""
        if self._record is None:
            raise pickle.UnpicklingError("it refers to storages, which only files of torch.save have")
        _, dtype, key, _, numel = pid
        return self._record(dtype, key, numel)


def _first(value: Any, *_: Any) -> Any:
    return value


def _from_type(function: Any, _: Any, args: Any, __: Any) -> Any:
    return cast(Callable[..., Any], function)(*args)
