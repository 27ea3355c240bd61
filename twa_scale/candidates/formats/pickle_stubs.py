"""Replacements for the classes and functions that a pickle names. None of these is imported or called."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from twa_scale.base.inputs import integers

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
_DTYPES = {name: value for name, value in vars(torch).items() if isinstance(value, torch.dtype)}
_PLAIN = (str, int, float, bool, bytes, type(None), torch.dtype)

Tensor = Callable[..., Any]


class PickleStub:
    """A placeholder for an object whose class is not imported.

    The state in the pickle becomes its attributes, or `state` if it is not a dict. The arguments and items in the
    pickle become `arguments`.
    """

    __slots__ = ("__dict__", "arguments")
    state: Any = None
    arguments: list[Any] | None

    def set_state(self, state: Any) -> None:
        """Set the state from the pickle."""
        if isinstance(state, tuple) and len(state) == 2 and state[0] is None and isinstance(state[1], dict):
            state = state[1]  # the state of a class with slots
        if isinstance(state, dict):
            self.__dict__ = state
        else:
            self.state = state

    def extend_arguments(self, values: Iterable[Any]) -> None:
        """Add arguments or items from the pickle."""
        if self.arguments is None:
            self.arguments = []
        self.arguments.extend(values)

    def __getattr__(self, name: str) -> Any:
        """Return None for an attribute that the state lacks, because states differ between versions."""
        if name.startswith("__"):
            raise AttributeError(name)

    @property
    def kind(self) -> str:
        """The full name of the class or function in the pickle."""
        return _full_name(type(self))

    @property
    def class_name(self) -> str:
        """The full name of the first class among `arguments`, which a function would construct, or `kind`."""
        classes = [value for value in self.arguments or () if isinstance(value, type) and issubclass(value, PickleStub)]
        return _full_name(classes[0]) if classes else self.kind


def _full_name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def nested_values(value: Any) -> Iterator[Any]:
    """Yield `value` and all values inside it, at any depth. The content of a shared container is yielded once."""
    pending, seen = [value], set()
    while pending:
        inner = pending.pop()
        yield inner
        if not isinstance(inner, PickleStub | Mapping | list | tuple | set) or id(inner) in seen:
            continue
        seen.add(id(inner))
        if isinstance(inner, PickleStub):
            pending += [*vars(inner).values(), *(inner.arguments or ())]
        else:
            pending += inner.values() if isinstance(inner, Mapping) else inner


@dataclass(frozen=True)
class SafeFunction:
    """A replacement for a function or class of a pickle. `make` builds the same value from plain data."""

    make: Callable[..., Any]


ResolvedGlobal = SafeFunction | torch.dtype | type[PickleStub]


def is_plain(key: Any) -> bool:
    """Return whether a key of a dict is a string, a number or an object.

    Items with other keys are dropped: tensors are not stored under them, and hashing a nested tuple can take very long.
    """
    if type(key) is int:
        return -1 << 63 <= key < 1 << 63  # larger integers can be chosen to have equal hashes
    return type(key) in _PLAIN or isinstance(key, PickleStub)


class GlobalResolver:
    """Resolves the names of classes and functions in a pickle to replacements.

    Args:
        tensor: builds a tensor from a record, the offset of its first element, shape, stride, and a dtype if it differs
            from that of the record. Without it, tensors are `PickleStub` objects.
    """

    def __init__(self, tensor: Tensor | None) -> None:
        self.unresolved: list[str] = []
        """The names without a replacement, in the order of the pickle."""
        self._resolved: dict[tuple[str, str], ResolvedGlobal] = {
            ("collections", "OrderedDict"): SafeFunction(_dict),
            ("collections", "defaultdict"): SafeFunction(lambda *_: {}),
            ("builtins", "set"): SafeFunction(_set),
            ("_codecs", "encode"): SafeFunction(_bytes),  # protocol 2 writes bytes this way
            ("torch", "Size"): SafeFunction(lambda sizes: torch.Size(integers(sizes))),
            ("torch._utils", "_rebuild_parameter"): SafeFunction(_first),
            ("torch._utils", "_rebuild_parameter_with_state"): SafeFunction(_first),
            ("torch._tensor", "_rebuild_from_type_v2"): SafeFunction(_from_type),
        }
        if tensor:
            build = tensor  # inside a lambda, mypy does not know that `tensor` is not None
            self._resolved["torch._utils", "_rebuild_tensor_v2"] = SafeFunction(
                lambda *args: build(*args[:4], lazy=args[6:7]),
            )
            self._resolved["torch._utils", "_rebuild_tensor_v3"] = SafeFunction(
                lambda *args: build(*args[:4], args[6], lazy=args[7:8]),
            )

    def resolve(self, module: Any, name: Any) -> ResolvedGlobal:
        """Return the replacement for `module.name`: by default a new subclass of `PickleStub`."""
        if not isinstance(module, str) or not isinstance(name, str):
            raise ValueError("the name of a class is not a string")
        module = "builtins" if module == "__builtin__" else module  # protocol 2 writes the name of Python 2
        if module in ("torch", "torch.storage") and name in _STORAGES:
            return _STORAGES[name]
        if module == "torch" and name in _DTYPES:
            return _DTYPES[name]
        if name == "ZeroStageEnum":  # DeepSpeed has it in different modules in different versions
            return SafeFunction(_first)
        if (module, name) not in self._resolved:
            self.unresolved.append(f"{module}.{name}")
            self._resolved[module, name] = type(name, (PickleStub,), {"__module__": module})
        return self._resolved[module, name]


def call(function: Any, args: Any) -> Any:
    """Return the value that replaces the result of `function(*args)` in the pickle."""
    if isinstance(function, type) and issubclass(function, PickleStub):
        stub = function()
        if args:
            stub.extend_arguments(args)
        return stub
    if not isinstance(args, tuple):
        raise ValueError("the arguments of a call are not a tuple")
    if isinstance(function, SafeFunction):
        return function.make(*args)
    if isinstance(function, PickleStub):
        return PickleStub()
    raise ValueError("a value that is not a class or function is called")


def _first(value: Any, *_: Any) -> Any:
    return value


def _from_type(function: Any, _: Any, args: Any, state: Any) -> Any:
    value = call(function, args)
    if isinstance(value, PickleStub):  # a tensor that consists of others, such as a DTensor, which its state holds
        value.set_state(state)
    return value


def _bytes(text: Any, encoding: Any = None, *_: Any) -> Any:
    return text.encode("latin1") if isinstance(text, str) and encoding == "latin1" else PickleStub()


def _dict(pairs: Iterable[Any] = ()) -> dict[Any, Any]:
    return {key: value for key, value in pairs if is_plain(key)}


def _set(values: Iterable[Any] = ()) -> set[Any]:
    return {value for value in values if is_plain(value)}
