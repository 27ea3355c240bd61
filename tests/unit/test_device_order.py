"""The GPU operations of a step on a simulated GPU: how often the host waits, and what orders streams."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import twa_scale
import twa_scale.engines.deferred_weights  # before the device is simulated: annotations name classes of torch.cuda
from tests.simulated import CUDA, Simulated, Stream, simulated
from twa_scale import TwaWarning
from twa_scale.base.spans import Span
from twa_scale.engines.model_checks import require_device
from twa_scale.engines.plain import PlainEngine
from twa_scale.kernels import choose_kernels
from twa_scale.ranks import Group
from twa_scale.store.host_memory import PinnedMemory
from twa_scale.store.make import host_store
from twa_scale.store.offloaded import OffloadedStore

SHAPES = {"0.weight": (300, 6), "0.bias": (300,), "2.weight": (3, 300), "2.bias": (3,)}


@pytest.fixture
def device() -> Iterator[Simulated]:
    with simulated() as made:
        yield made


def build(device: Simulated) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 300), nn.Tanh(), nn.Linear(300, 3))
    for layer in model:
        for name, parameter in list(layer.named_parameters(recurse=False)):
            layer._parameters[name] = nn.Parameter(device.on_device(parameter.detach()))
    return model


def candidates() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [{name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()} for _ in range(4)]


class UnitsOnStreams(PlainEngine):
    """An engine whose units are layers and whose gradients come on a separate stream, as with FSDP2."""

    def __init__(self, module: nn.Module, device: Simulated) -> None:
        super().__init__(module, Group.alone())
        self._simulated = device
        self._side = device.stream()

    def units(self) -> list[list[Span]]:
        return [[span for span in self.spans() if span.name[0] == layer] for layer in "02"]

    def before_use(self, settle: Callable[[int], Any]) -> None:
        for unit, layer in enumerate(map(self.module.get_submodule, "02")):
            layer.register_forward_pre_hook(lambda *_, unit=unit: settle(unit) and None)

    def watch(self, consume: Callable[[Span, Tensor], None]) -> None:
        super().watch(partial(self._beside, consume))

    def _beside(self, consume: Callable[[Span, Tensor], None], span: Span, gradient: Tensor) -> None:
        self._side.wait_stream(self._simulated.current)
        with self._simulated.on(self._side):
            consume(span, gradient)
        self._simulated.current.wait_stream(self._side)  # which frees the gradient


SETTINGS: list[dict[str, Any]] = [
    {"store": "dense32"},
    {"store": "packed4", "groups": "tensor", "basis": "orthonormal"},
    {"store": "packed4", "store_device": "cpu"},
    {"max_weight_grad_norm": 1.0, "max_grad_norm": 1.0},
    {"combine": "forward"},
    {"combine": "forward", "store_device": "cpu", "store": "dense16"},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_a_step_waits_once(device: Simulated, settings: dict[str, Any]) -> None:
    """The host waits only for the reduced products, which decide whether there is a step."""
    model = build(device)
    engine = UnitsOnStreams(model, device) if "combine" in settings else model
    twa = twa_scale.attach(engine, candidates(), settings | {"kernels": "torch"})
    x = device.on_device(torch.randn(8, 6))
    for _ in range(3):
        device.waits.clear()
        model(x).square().mean().backward()
        assert device.waits == []
        twa.step()
        assert device.waits == ["copy to the host"]
        twa.zero_grad()
    assert device.hazards == []
    twa.close()


def test_a_write_through_data_is_reported_without_a_wait(device: Simulated) -> None:
    model = build(device)
    twa = twa_scale.attach(model, candidates(), {"store": "dense32", "kernels": "torch"})
    model.get_parameter("0.weight").data.mul_(2)
    model(device.on_device(torch.randn(8, 6))).square().mean().backward()
    device.waits.clear()
    with pytest.warns(TwaWarning, match=r"0\.weight.*`\.data`"):
        twa.step()
    assert device.waits == ["copy to the host"]
    twa.close()


def forward_and_step(device: Simulated) -> None:
    """Combine units on a separate stream, from a store in host memory."""
    model = build(device)
    settings = {"combine": "forward", "store_device": "cpu", "store": "dense16", "kernels": "torch"}
    twa = twa_scale.attach(UnitsOnStreams(model, device), candidates(), settings)
    x = device.on_device(torch.randn(8, 6))
    for _ in range(3):
        model(x).square().mean().backward()
        twa.step()
        twa.zero_grad()
    twa.close()


def two_buffers(device: Simulated) -> None:
    """Use a store in host memory whose buffers alternate between two streams."""
    config, kernels = twa_scale.TwaConfig(store="packed4", kernels="torch"), choose_kernels("torch", CUDA)
    store = OffloadedStore(lambda allocate: host_store(config, 2, allocate), CUDA, kernels, 4096)
    span, streams = Span("w", 0, 9000), [device.current, device.stream()]
    target = store.reserve(span)
    store.kernels.make_deltas(torch.randn(2, 9000), [0.5, 0.5], target, 0)
    inputs = [
        (device.on_device(torch.randn(9000)), device.on_device(torch.randn(2)), device.on_device(torch.empty(9000)))
        for _ in range(2)
    ]
    streams[1].wait_stream(streams[0])
    for stream, (gradient, weights, out) in zip(streams, inputs, strict=True):
        with device.on(stream):
            kept = store.project(span, gradient, True)
            store.combine(span, weights, 0.7, out)
            del kept
    for stream in streams:
        streams[0].wait_stream(stream)
    store.close()


@pytest.mark.parametrize(
    ("work", "left_out"),
    [
        (forward_and_step, None),
        (forward_and_step, "wait_event"),
        (forward_and_step, "wait_stream"),
        (two_buffers, None),
        (two_buffers, "wait_event"),
    ],
)
def test_streams_are_ordered(
    device: Simulated, work: Callable[[Simulated], None], left_out: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No operation uses memory that another stream may still write or read, and each wait is needed."""
    if left_out:
        monkeypatch.setattr(Stream, left_out, lambda *_: None)
    work(device)
    assert bool(device.hazards) == bool(left_out), device.hazards


def test_weights_on_two_devices_are_refused(device: Simulated) -> None:
    model = build(device)
    model[2] = nn.Linear(300, 3)
    with pytest.raises(twa_scale.EngineError, match=r"divided over cpu and cuda:0.*fully_shard"):
        twa_scale.attach(model, candidates())


@pytest.mark.parametrize("kind", ["mps", "xpu"])
def test_devices_without_kernels_are_refused(device: Simulated, kind: str) -> None:
    engine = UnitsOnStreams(build(device), device)
    engine.device = torch.device(kind)
    with pytest.raises(twa_scale.EngineError, match=rf"on {kind}; .* with CUDA or ROCm\. Move"):
        require_device(engine)


def test_engine_device_without_an_index(device: Simulated) -> None:
    engine = UnitsOnStreams(build(device), device)
    engine.device = torch.device("cuda")
    require_device(engine)


def test_page_locked_memory_is_unlocked_with_its_tensor(device: Simulated) -> None:
    """The system may give its addresses to other memory, which could not be locked then."""
    memory = PinnedMemory(CUDA)
    first, second = (memory.zeros(100, dtype=torch.float32, device=torch.device("cpu")) for _ in range(2))
    assert device.locked(first) and device.locked(second)
    del first
    assert device.num_locked == 1
    memory.close()
    assert device.num_locked == 0
    del second  # not unlocked again
