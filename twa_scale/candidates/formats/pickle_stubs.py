"""What stands for the classes and functions that a pickle names; none of them is imported or called."""

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


class Opaque:
    """Stands for an object of a class that was not imported.

    What the pickle says of its state are its attributes, or `state` if that is no dict; its arguments and items are
    `given`.
    """

    __slots__ = ("__dict__", "given")
    state: Any = None
    given: list[Any] | None

    def set_state(self, state: Any) -> None:
        """Take the state that the pickle gives it."""
        if isinstance(state, dict):
            self.__dict__ = state
        else:
            self.state = state

    def give(self, values: Iterable[Any]) -> None:
        """Keep arguments or items."""
        if self.given is None:
            self.given = []
        self.given.extend(values)

    def __getattr__(self, name: str) -> Any:
        """Return None for what the state lacks, as versions differ."""
        if name.startswith("__"):
            raise AttributeError(name)

    @property
    def kind(self) -> str:
        """The name of the class or function that it stands for."""
        return _full_name(type(self))

    @property
    def what(self) -> str:
        """The class that a function was asked to make; else `kind`."""
        classes = [given for given in self.given or () if isinstance(given, type) and issubclass(given, Opaque)]
        return _full_name(classes[0]) if classes else self.kind


def _full_name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def within(value: Any) -> Iterator[Any]:
    """Yield what an object or container holds, at any depth; what is shared comes once."""
    waiting, seen = [value], set()
    while waiting:
        inner = waiting.pop()
        yield inner
        if not isinstance(inner, Opaque | Mapping | list | tuple | set) or id(inner) in seen:
            continue
        seen.add(id(inner))
        if isinstance(inner, Opaque):
            waiting += [*vars(inner).values(), *(inner.given or ())]
        else:
            waiting += inner.values() if isinstance(inner, Mapping) else inner


@dataclass(frozen=True)
class Known:
    """A function or class that has a meaning here: `make` does what it would, on plain data."""

    make: Callable[..., Any]


Meaning = Known | torch.dtype | type[Opaque]


def is_plain(key: Any) -> bool:
    """Whether a key of a dict is a text, a number or an object.

    Items under other keys are left out: no tensor stands there, and the hash of a tuple can take for ever.
    """
    if type(key) is int:
        return -1 << 63 <= key < 1 << 63  # beyond, any number of integers can be made that have one hash
    return type(key) in _PLAIN or isinstance(key, Opaque)


class Meanings:
    """Looks up what stands for a name in a pickle.

    Args:
        tensor: called with a record, the offset of the first element in it, shape, stride, and a dtype if it is not
            the record's; without it, tensors are opaque.
    """

    def __init__(self, tensor: Tensor | None) -> None:
        self.foreign: list[str] = []
        """Names that have no meaning here, in the order in which they were met."""
        self._found: dict[tuple[str, str], Meaning] = {
            ("collections", "OrderedDict"): Known(_dict),
            ("collections", "defaultdict"): Known(lambda *_: {}),
            ("builtins", "set"): Known(_set),
            ("_codecs", "encode"): Known(_bytes),  # as bytes are written in protocol 2
            ("torch", "Size"): Known(lambda sizes: torch.Size(integers(sizes))),
            ("torch._utils", "_rebuild_parameter"): Known(_first),
            ("torch._utils", "_rebuild_parameter_with_state"): Known(_first),
            ("torch._tensor", "_rebuild_from_type_v2"): Known(_from_type),
        }
        if tensor:
            build = tensor  # mypy forgets what it knows of `tensor` inside functions
            self._found["torch._utils", "_rebuild_tensor_v2"] = Known(
                lambda *args: build(*args[:4], lazy=args[6:7]),
            )
            self._found["torch._utils", "_rebuild_tensor_v3"] = Known(
                lambda *args: build(*args[:4], args[6], lazy=args[7:8]),
            )

    def of(self, module: Any, name: Any) -> Meaning:
        """Return what stands for `module.name`."""
        if not isinstance(module, str) or not isinstance(name, str):
            raise ValueError("the name of a class is no text")
        module = "builtins" if module == "__builtin__" else module  # its name in Python 2, which protocol 2 keeps
        if module in ("torch", "torch.storage") and name in _STORAGES:
            return _STORAGES[name]
        if module == "torch" and name in _DTYPES:
            return _DTYPES[name]
        if name == "ZeroStageEnum":  # of DeepSpeed, whose versions keep it in several places
            return Known(_first)
        if (module, name) not in self._found:
            self.foreign.append(f"{module}.{name}")
            self._found[module, name] = type(name, (Opaque,), {"__module__": module})
        return self._found[module, name]


def call(function: Any, args: Any) -> Any:
    """Return what calling `function` with a tuple of arguments stands for."""
    if isinstance(function, type) and issubclass(function, Opaque):
        made = function()
        if args:
            made.give(args)
        return made
    if not isinstance(args, tuple):
        raise ValueError("the arguments of a call are no tuple")
    if isinstance(function, Known):
        return function.make(*args)
    if isinstance(function, Opaque):
        return Opaque()
    raise ValueError("something is called that is no class or function")


def _first(value: Any, *_: Any) -> Any:
    return value


def _from_type(function: Any, _: Any, args: Any, __: Any) -> Any:
    return call(function, args)


def _bytes(text: Any, encoding: Any = None, *_: Any) -> Any:
    return text.encode("latin1") if isinstance(text, str) and encoding == "latin1" else Opaque()


def _dict(pairs: Iterable[Any] = ()) -> dict[Any, Any]:
    return {key: value for key, value in pairs if is_plain(key)}


def _set(values: Iterable[Any] = ()) -> set[Any]:
    return {value for value in values if is_plain(value)}
