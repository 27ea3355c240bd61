"""A simulated CUDA device: tensors that report this device, streams and events.

Their memory is the CPU's, and every operation is computed at once, in the order of the program, so results are right.
What a GPU would do otherwise is recorded: how often the host waits for the device, how many kernels are launched, and
operations on the same memory that nothing orders, of two streams or of the host beside a copy. Order is that of vector
clocks: a stream knows up to which operation of each other stream it has waited.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

aten = torch.ops.aten
CUDA = torch.device("cuda", 0)
_HOST = "host"
_Clock = Counter[str]


class Memory:
    """The last write of a piece of memory, and the reads since then."""

    def __init__(self, device: "Simulated", owner: str) -> None:
        self.device = device
        self._owner = owner
        self._written: tuple[str, int] | None = None
        self._read: dict[str, int] = {}

    def access(self, stream: str, at: int, clock: _Clock, what: str, *, write: bool) -> None:
        """Record an operation, and whether nothing orders it after one that it depends on."""
        before = dict([self._written] if self._written else [])
        if write:
            before |= self._read
        for other, tick in before.items():
            if other != stream and clock[other] < tick:
                self.device.hazards.append(f"{what} on {stream} does not wait for {other}")
        if write:
            self._written, self._read = (stream, at), {}
        else:
            self._read[stream] = at

    def __del__(self) -> None:
        """The stream that allocated the memory may reuse it, so other streams must have finished with it."""
        last = dict([self._written] if self._written else []) | self._read
        clock = self.device.clock_of(self._owner)
        for other, tick in last.items():
            if self._owner != _HOST and other != self._owner and clock[other] < tick:
                self.device.hazards.append(f"memory of {self._owner} is freed while {other} uses it")


class DeviceTensor(Tensor):
    """A tensor that says that it is on the device. `host` is the same memory, as what it is."""

    host: Tensor
    memory: Memory

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function == Tensor.device.__get__:
            return CUDA
        if function == Tensor.is_cuda.__get__:  # type: ignore[attr-defined]
            return True
        if function in (Tensor.cpu, Tensor.tolist) or (function == Tensor.to and _to_cpu(args[1:], kwargs)):
            args[0].memory.device.copied(args[0], waits=not kwargs.get("non_blocking"))
            return function(args[0].host.clone(), *args[1:], **kwargs)
        with torch._C.DisableTorchFunctionSubclass():
            return function(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch assigns a function without arguments' defaults
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        on_device = next(leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, DeviceTensor))
        return on_device.memory.device.run(function, args, kwargs or {})


def _to_cpu(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    wanted = [item.device if isinstance(item, Tensor) else item for item in (*args, *kwargs.values())]
    return any(isinstance(item, torch.device | str) and torch.device(item).type == "cpu" for item in wanted)


class Stream:
    """A replacement for `torch.cuda.Stream`."""

    def __init__(self, simulated: "Simulated", name: str) -> None:
        self._simulated = simulated
        self.name = name
        self.clock: _Clock = Counter()

    def wait_stream(self, other: "Stream") -> None:
        self.clock |= other.clock

    def wait_event(self, event: "Event") -> None:
        self.clock |= event.clock

    def record_event(self, event: "Event | None" = None) -> "Event":
        event = event or Event(self._simulated)
        event.record(self)
        return event

    def synchronize(self) -> None:
        self._simulated.host_waits(self.clock)


class Event:
    """A replacement for `torch.cuda.Event`. Everything has always completed when it is queried."""

    def __init__(self, simulated: "Simulated", **_: object) -> None:
        self._simulated = simulated
        self.clock: _Clock = Counter()

    def record(self, stream: Stream | None = None) -> None:
        self.clock = Counter((stream or self._simulated.current).clock)

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        self._simulated.host |= self.clock

    def elapsed_time(self, _: "Event") -> float:
        return 0.0


class Simulated(TorchDispatchMode):
    """The device, in a `with` block of `simulated`."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.waits: list[str] = []
        """What made the host wait for the device."""
        self.launches: Counter[str] = Counter()
        """Kernels and copies, by operation."""
        self.hazards: list[str] = []
        """Operations that nothing orders. Memory that is still in use when it is freed is one, too."""
        self.host: _Clock = Counter()
        self.streams = [Stream(self, "the default stream")]
        self.current = self.streams[0]
        self._locked: dict[int, tuple[int, Tensor | None]] = {}
        self._host_memory: dict[int, Memory] = {}

    def stream(self, *_: object, **__: object) -> Stream:
        self.streams.append(Stream(self, f"stream {len(self.streams)}"))
        return self.streams[-1]

    @contextmanager
    def on(self, stream: Stream) -> Iterator[None]:
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    def clock_of(self, owner: str) -> _Clock:
        return self.host if owner == _HOST else next(s.clock for s in self.streams if s.name == owner) | self.host

    def host_waits(self, clock: _Clock, what: str = "synchronize") -> None:
        self.waits.append(what)
        self.host |= clock

    def synchronize(self, *_: object) -> None:
        for stream in self.streams:
            self.host |= stream.clock
        self.waits.append("synchronize")

    def on_device(self, host: Tensor, memory: Memory | None = None) -> DeviceTensor:
        """Return a tensor on the device with the memory of `host`."""
        made: DeviceTensor = torch.Tensor._make_subclass(DeviceTensor, host)
        made.host, made.memory = host, memory or Memory(self, self.current.name)
        return made

    def lock(self, address: int, nbytes: int, tensor: Tensor | None = None) -> None:
        """Page-lock memory. That of `tensor` is not reused, because copies may be in progress."""
        self._locked[address] = (address + nbytes, tensor)

    def unlock(self, address: int) -> None:
        del self._locked[address]

    @property
    def num_locked(self) -> int:
        """The number of pieces of page-locked memory."""
        return len(self._locked)

    def locked(self, tensor: Tensor) -> bool:
        return any(low <= tensor.data_ptr() < high for low, (high, _) in self._locked.items())

    def copied(self, on_device: DeviceTensor, *, waits: bool) -> None:
        """Record a copy to the host."""
        self._launch("copy to the host", [on_device.memory], [])
        if waits:
            self.host_waits(self.current.clock, "copy to the host")

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.run(function, args, kwargs or {})

    def run(self, function: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Compute an operation, and record its effect on the device."""
        fars = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, DeviceTensor)]
        away = torch.device(kwargs["device"]).type == "cuda" if kwargs.get("device") else bool(fars)
        near_args, near_kwargs = tree_map_only(DeviceTensor, lambda on_device: on_device.host, (args, kwargs))
        on_cpu = {"device": torch.device("cpu")} if kwargs.get("device") else {}
        out = function(*near_args, **{**near_kwargs, **on_cpu})
        known = {id(on_device.host): on_device for on_device in fars}  # in-place operations return their argument
        positions = {
            on_device.host.untyped_storage().data_ptr(): on_device.memory for on_device in fars if on_device.nbytes
        }
        made: list[Memory] = []

        def wrapped(host: Tensor) -> Tensor:
            if id(host) in known:
                return known[id(host)]
            on_device = self.on_device(host, positions.get(host.untyped_storage().data_ptr()))
            made.append(on_device.memory)
            return on_device

        if away and function.overloadpacket is not aten._local_scalar_dense:
            out = tree_map_only(Tensor, wrapped, out)
        self._record(function, args, kwargs, made)
        return out

    def _record(self, function: Any, args: Any, kwargs: dict[str, Any], made: list[Memory]) -> None:
        name = str(function.overloadpacket).removeprefix("aten.")
        read: list[Tensor] = []
        written: list[Tensor] = []
        for i, argument in enumerate(function._schema.arguments):
            value = args[i] if i < len(args) else kwargs.get(argument.name)
            alias = argument.alias_info
            if alias is not None and not alias.is_write:  # a view
                return
            (read if alias is None else written).extend(t for t in tree_leaves(value) if isinstance(t, Tensor))
        if name in ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "is_pinned"):
            return
        hosts = [t for t in read if not isinstance(t, DeviceTensor)]
        sources, targets = (list(map(self._memory, tensors)) for tensors in (read, written))
        if not made and not any(isinstance(t, DeviceTensor) for t in (*read, *written)):
            self._access(_HOST, self.host, name, sources, targets)
            return
        self._launch(name, sources, targets + made)
        if name == "_local_scalar_dense":
            self.host_waits(self.current.clock, "a number is read")
        if name in ("copy_", "_to_copy") and hosts:
            at_once = kwargs.get("non_blocking") or args[2:3] == (True,)
            if not at_once or not all(map(self.locked, hosts)):
                self.host_waits(self.current.clock, "a copy that is waited for, or from memory that is not locked")

    def _launch(self, name: str, read: list[Memory], written: list[Memory]) -> None:
        self.launches[name] += 1
        self.current.clock |= self.host
        self._access(self.current.name, self.current.clock, name, read, written)

    def _access(self, place: str, clock: _Clock, name: str, read: list[Memory], written: list[Memory]) -> None:
        clock[place] += 1
        for memories, write in ((read, False), (written, True)):
            for memory in memories:
                memory.access(place, clock[place], clock, name, write=write)

    def _memory(self, tensor: Tensor) -> Memory:
        if isinstance(tensor, DeviceTensor):
            return tensor.memory
        if not self.locked(tensor):  # copies from other memory complete before the host continues
            return Memory(self, _HOST)
        return self._host_memory.setdefault(tensor.untyped_storage().data_ptr(), Memory(self, _HOST))


def _pinned(device: Simulated, tensor: Tensor) -> Tensor:
    copy = tensor.clone()
    device.lock(copy.data_ptr(), copy.nbytes, copy)
    return copy


def _tensor(make: Any, data: Any, *, device: Any = None, **options: Any) -> Tensor:
    """Do what `torch.tensor` does, which moves its result without calling modes."""
    made: Tensor = make(data, **options)
    return made if device is None else made.to(device)


@contextmanager
def simulated() -> Iterator[Simulated]:
    """Simulate the device in torch, for the functions of `torch.cuda` that this project uses."""
    device = Simulated()
    stands_in = {
        "_lazy_init": lambda: None,
        "Event": lambda **_: Event(device),
        "Stream": device.stream,
        "current_stream": lambda *_: device.current,
        "stream": device.on,
        "device": nullcontext,
        "synchronize": device.synchronize,
        "cudart": lambda: SimpleNamespace(
            cudaHostRegister=lambda address, nbytes, _: device.lock(address, nbytes),
            cudaHostUnregister=device.unlock,
        ),
        "check_error": lambda _: None,
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in stands_in.items():
            patch.setattr(torch.cuda, name, value)
        patch.setattr(Tensor, "pin_memory", lambda tensor: _pinned(device, tensor))
        patch.setattr(torch, "tensor", partial(_tensor, torch.tensor))
        with device:
            yield device
