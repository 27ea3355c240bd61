"""An unpickler for checkpoints that imports and runs nothing, with time and memory proportional to the file size."""

import struct
from collections.abc import Callable
from typing import Any

import torch

from twa_scale.candidates.formats.pickle_stubs import GlobalResolver, PickleStub, Tensor, call, is_plain

MAX_PICKLE = 1 << 30
"""The largest accepted pickle, in bytes. A model of 1e12 parameters on 1,000 ranks needs a few hundred MB."""
_MAX_STEPS = 100_000_000  # instructions; each creates at most one object of some 70 bytes
_MAX_INT = 1024  # bytes
_MAX_NAME = 1000  # bytes of the name of a module or class

_Record = Callable[[torch.dtype, str, int], Any]
_MARK = object()


class SafeUnpickler:
    """Builds containers, numbers and tensors from a pickle, and `PickleStub` objects in place of all other objects.

    It implements the instructions (of protocols 2 to 5) that picklers of plain data and torch.save use. Python's
    unpickler trusts the file in three ways that this one does not: it imports and calls what the file names, it
    allocates what the file claims (a memo index, a length), and it hashes any key.

    Args:
        raw: the pickle.
        record: called with the persistent id that torch.save writes for a storage: (dtype, key, number of elements).
        tensor: see `GlobalResolver`.
    """

    def __init__(self, raw: bytes | bytearray, record: _Record | None = None, tensor: Tensor | None = None) -> None:
        self._raw = raw
        self._position = 0
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}
        self._record = record
        self._resolver = GlobalResolver(tensor)

    @property
    def unresolved(self) -> list[str]:
        """The classes and functions in the pickle that have no replacement other than `PickleStub`."""
        return self._resolver.unresolved

    def load(self) -> Any:
        """Return the pickled value.

        Raises:
            ValueError: the pickle is damaged, or has instructions that checkpoints do not use.
        """
        if len(self._raw) > MAX_PICKLE:
            raise ValueError(f"it has more than {MAX_PICKLE} bytes")
        try:
            return self._run()
        except IndexError:
            raise ValueError("it ends too early, or pops from an empty stack") from None
        except KeyError as error:
            raise ValueError(f"byte {self._position - 1}: {error} is not a known instruction or memo entry") from None
        except (TypeError, AttributeError, OverflowError) as error:
            raise ValueError(f"byte {self._position - 1}: {error}") from error

    def _run(self) -> Any:
        raw, stack, memo, handlers = self._raw, self._stack, self._memo, _HANDLERS
        position = 0
        for _ in range(_MAX_STEPS):
            code = raw[position]
            position += 1
            # These branches are two thirds of the millions of instructions in the metadata of large checkpoints.
            if code == _MEMOIZE:
                memo[len(memo)] = stack[-1]
            elif code == _LONG_BINGET:
                stack.append(memo[int.from_bytes(raw[position : position + 4], "little")])
                position += 4
            elif code == _BINGET:
                stack.append(memo[raw[position]])
                position += 1
            elif code == _BININT1:
                stack.append(raw[position])
                position += 1
            elif code == _STOP:
                return stack.pop()
            else:
                self._position = position
                handlers[code](self)
                position = self._position
        raise ValueError(f"it has more than {_MAX_STEPS} instructions")

    # Reading operands

    def _take(self, count: int) -> bytes | bytearray:
        start = self._position
        if count > len(self._raw) - start:
            raise IndexError
        self._position = start + count
        return self._raw[start : start + count]

    def _number(self, layout: struct.Struct) -> Any:
        start = self._position
        self._position = start + layout.size
        if self._position > len(self._raw):
            raise IndexError
        return layout.unpack_from(self._raw, start)[0]

    def _line(self) -> str:
        end = self._raw.find(b"\n", self._position, self._position + _MAX_NAME)
        if end < 0:
            raise IndexError
        line = self._take(end - self._position).decode()
        self._position += 1
        return line

    def _marked(self) -> list[Any]:
        """Pop all values since the last mark, and the mark, from the stack."""
        stack = self._stack
        start = len(stack) - 1
        while stack[start] is not _MARK:
            start -= 1
            if start < 0:
                raise IndexError
        items = stack[start + 1 :]
        del stack[start:]
        return items

    # Plain values

    def _push_number(self, layout: struct.Struct) -> None:
        self._stack.append(self._number(layout))

    def _push_int(self, layout: struct.Struct) -> None:
        count = self._number(layout)
        if not 0 <= count <= _MAX_INT:
            raise ValueError(f"it holds an integer of {count} bytes")
        self._stack.append(int.from_bytes(self._take(count), "little", signed=True))

    def _push_text(self, layout: struct.Struct) -> None:
        self._stack.append(self._take(self._number(layout)).decode())

    def _push_bytes(self, layout: struct.Struct) -> None:
        self._stack.append(bytes(self._take(self._number(layout))))

    # Containers

    def _tuple_of_one(self) -> None:
        self._stack[-1] = (self._stack[-1],)

    def _tuple_of_two(self) -> None:
        second = self._stack.pop()
        self._stack[-1] = (self._stack[-1], second)

    def _tuple_of_three(self) -> None:
        third, second = self._stack.pop(), self._stack.pop()
        self._stack[-1] = (self._stack[-1], second, third)

    def _append_to(self, values: list[Any]) -> None:
        into = self._stack[-1]
        if type(into) is list:
            into.extend(values)
        elif type(into) is set:
            into.update(value for value in values if is_plain(value))
        elif isinstance(into, PickleStub):
            into.extend_arguments(values)
        else:
            raise ValueError(f"items are added to a {type(into).__name__}")

    def _append_one(self) -> None:
        self._append_to([self._stack.pop()])

    def _append_marked(self) -> None:
        self._append_to(self._marked())

    def _set_items(self, items: list[Any]) -> None:
        into = self._stack[-1]
        if type(into) is dict:
            for key, value in zip(items[::2], items[1::2], strict=True):
                if type(key) is str or is_plain(key):
                    into[key] = value
        elif isinstance(into, PickleStub):
            into.extend_arguments(items[1::2])
        else:
            raise ValueError(f"items are set in a {type(into).__name__}")

    def _set_one(self) -> None:
        value, key = self._stack.pop(), self._stack.pop()
        self._set_items([key, value])

    def _set_marked(self) -> None:
        self._set_items(self._marked())

    # Names and calls

    def _global(self) -> None:
        self._stack.append(self._resolver.resolve(self._line(), self._line()))

    def _stack_global(self) -> None:
        name, module = self._stack.pop(), self._stack.pop()
        self._stack.append(self._resolver.resolve(module, name))

    def _call(self) -> None:
        args = self._stack.pop()
        self._stack[-1] = call(self._stack[-1], args)

    def _call_with_names(self) -> None:
        named = self._stack.pop()
        self._call()
        if isinstance(self._stack[-1], PickleStub) and isinstance(named, dict):
            self._stack[-1].extend_arguments(named.values())

    def _build(self) -> None:
        state = self._stack.pop()
        if isinstance(self._stack[-1], PickleStub):
            self._stack[-1].set_state(state)

    def _persistent(self) -> None:
        if self._record is None:
            raise ValueError("it refers to storages, which only archives of torch.save have")
        kind, dtype, key, _, numel = self._stack.pop()
        if kind != "storage" or type(key) is not str or type(numel) is not int or not 0 <= numel < 1 << 63:
            raise ValueError("the persistent id of a storage is not a type, name and number of elements")
        self._stack.append(self._record(dtype, key, numel) if isinstance(dtype, torch.dtype) else PickleStub())

    # The memo

    def _put(self, layout: struct.Struct) -> None:
        self._memo[self._number(layout)] = self._stack[-1]


_Handler = Callable[[SafeUnpickler], Any]


def _with(handler: Callable[[SafeUnpickler, Any], Any], argument: Any) -> _Handler:
    return lambda machine: handler(machine, argument)


def _pushing(make: Callable[[], Any]) -> _Handler:
    return lambda machine: machine._stack.append(make())


_U1, _U2, _U4, _U8, _I4 = map(struct.Struct, ("<B", "<H", "<I", "<Q", "<i"))
_MEMOIZE, _BINGET, _LONG_BINGET, _BININT1, _STOP = 0x94, *b"hjK."
_S = SafeUnpickler
_HANDLERS: dict[int, _Handler] = {
    0x80: _with(_S._number, _U1),  # PROTO
    0x95: _with(_S._number, _U8),  # FRAME
    ord("("): _pushing(lambda: _MARK),
    ord("0"): lambda machine: machine._stack.pop(),
    ord("1"): lambda machine: machine._marked(),
    ord("N"): _pushing(lambda: None),
    0x88: _pushing(lambda: True),
    0x89: _pushing(lambda: False),
    ord("M"): _with(_S._push_number, _U2),
    ord("J"): _with(_S._push_number, _I4),
    ord("G"): _with(_S._push_number, struct.Struct(">d")),
    0x8A: _with(_S._push_int, _U1),
    0x8B: _with(_S._push_int, _I4),
    0x8C: _with(_S._push_text, _U1),
    ord("X"): _with(_S._push_text, _U4),
    0x8D: _with(_S._push_text, _U8),
    ord("C"): _with(_S._push_bytes, _U1),
    ord("B"): _with(_S._push_bytes, _U4),
    0x8E: _with(_S._push_bytes, _U8),
    0x96: _with(_S._push_bytes, _U8),  # BYTEARRAY8
    ord("}"): _pushing(dict),
    ord("]"): _pushing(list),
    ord(")"): _pushing(tuple),
    0x8F: _pushing(set),
    ord("t"): lambda machine: machine._stack.append(tuple(machine._marked())),
    0x91: lambda machine: machine._stack.append({value for value in machine._marked() if is_plain(value)}),  # FROZENSET
    0x85: _S._tuple_of_one,
    0x86: _S._tuple_of_two,
    0x87: _S._tuple_of_three,
    ord("a"): _S._append_one,
    ord("e"): _S._append_marked,
    0x90: _S._append_marked,  # ADDITEMS
    ord("s"): _S._set_one,
    ord("u"): _S._set_marked,
    ord("c"): _S._global,
    0x93: _S._stack_global,
    ord("R"): _S._call,
    0x81: _S._call,  # NEWOBJ
    0x92: _S._call_with_names,  # NEWOBJ_EX
    ord("b"): _S._build,
    ord("Q"): _S._persistent,
    ord("q"): _with(_S._put, _U1),
    ord("r"): _with(_S._put, _U4),
}
