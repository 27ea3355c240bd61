"""Stores in host memory give the results of stores on the device, which is the CPU in these tests."""

from importlib import import_module
from typing import Any, Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import twa_scale
from tests.deltas import fill
from twa_scale.base.spans import Span
from twa_scale.config import TwaConfig
from twa_scale.kernels import Coding, choose_kernels
from twa_scale.running.window_store import WindowStore
from twa_scale.store import InMemoryStore, Store, make_store
from twa_scale.store.make import host_store
from twa_scale.store.offloaded import OffloadedStore
from twa_scale.store.staging import Staging

CPU = torch.device("cpu")
NAMES = ["dense32", "dense16", "packed8", "packed4", "packed2", "packed1"]
each_store = pytest.mark.parametrize("name", NAMES)


def offloaded(config: TwaConfig, n: int, buffer: int, coding: Coding | None = None) -> OffloadedStore:
    kernels = choose_kernels(config.kernels, CPU)
    return OffloadedStore(lambda allocate: host_store(config, n, allocate, coding), CPU, kernels, buffer)


def resident(config: TwaConfig, n: int) -> Store:
    return make_store(config, n, CPU, lambda name: [])


def check(one: Store, other: Store, span: Span, n: int, with_center: bool, dtype: torch.dtype = torch.float32) -> None:
    """Check that weights are equal, and products up to the order of sums and the center's tiles."""
    gradient, weights = torch.randn(len(span)), torch.randn(n)
    actual = [store.project(span, gradient, with_center) for store in (one, other)]
    assert actual[0].dtype == torch.float64 and actual[0].shape == (n + 1,)
    torch.testing.assert_close(actual[1][:-1], actual[0][:-1], rtol=1e-12, atol=1e-10)
    torch.testing.assert_close(actual[1][-1], actual[0][-1], rtol=1e-6, atol=1e-6 * len(span) ** 0.5)
    assert bool(actual[1][-1]) == (with_center and len(span) > 0)
    outs = [torch.full((len(span),), torch.nan, dtype=dtype) for _ in range(2)]
    for store, out in zip((one, other), outs, strict=True):
        store.combine(span, weights, 0.7, out)
    assert torch.equal(*outs)


@each_store
@settings(max_examples=25)
@given(
    data=st.data(),
    n=st.integers(1, 6),
    m=st.one_of(st.integers(0, 600), st.sampled_from([1024, 4096, 8192, 20_001])),
    start=st.integers(0, 700),
    buffer=st.sampled_from([0, 4096, 20_000, 1 << 26]),
    kernels=st.sampled_from(["torch", "numba"]),
)
def test_stores_in_host_memory_equal_those_on_the_device(
    name: Any, data: st.DataObject, n: int, m: int, start: int, buffer: int, kernels: Literal["torch", "numba"]
) -> None:
    """Buffers of one tile, several tiles, and more than a span, filled with chunks of any size."""
    torch.manual_seed(m)
    config, span = TwaConfig(store=name, kernels=kernels), Span("w", start, start + m)
    values, borders = torch.randn(n, m), range(128 - start % 128, m, 128)
    stores = resident(config, n), offloaded(config, n, buffer)
    for store in stores:
        fill(store, span, values, sorted(data.draw(st.lists(st.sampled_from(borders), max_size=3))) if borders else [])
    assert stores[0].nbytes == stores[1].nbytes
    for with_center in (False, True):
        check(*stores, span, n, with_center)
    check(*stores, span, n, True, torch.bfloat16)
    for store in stores:
        store.close()


class FakeWindow:
    """The parts of a window that `WindowStore` uses: its store, and the rows of its spans."""

    def __init__(self, store: Store, span: Span, values: Tensor) -> None:
        self.store = store
        fill(store, span, values)
        inner = store._inner if isinstance(store, OffloadedStore) else store
        assert isinstance(inner, InMemoryStore)
        self.rows_and_base = inner.rows_and_center


@each_store
@pytest.mark.parametrize("part", [128 * 16, 1500])
def test_parts_of_a_span_are_read_where_they_are(name: Any, part: int) -> None:
    """As for experts of a stacked tensor in a window, whose parts start within tiles or at their start."""
    torch.manual_seed(0)
    n, count, config = 3, 5, TwaConfig(store=name)
    span = Span("w", 0, count * part)
    pieces = [(i * part, Span("w", i * part, (i + 1) * part)) for i in range(count)]
    gradient, values = torch.randn(len(span)), torch.randn(n, len(span))
    for store in (resident(config, n), offloaded(config, n, 4096)):
        window: Any = FakeWindow(store, span, values)
        parts = WindowStore(window, store.coding, {span: pieces})
        products = [parts.project(piece, gradient[start : start + part], True) for start, piece in pieces]
        torch.testing.assert_close(sum(products), store.project(span, gradient, True), rtol=1e-5, atol=1e-3)
        whole, weights = torch.empty(len(span)), torch.randn(n)
        store.combine(span, weights, 0.7, whole)
        for start, indices in pieces:
            out = torch.full((part,), torch.nan)
            parts.combine(indices, weights, 0.7, out)
            assert torch.equal(out, whole[start : start + part])
        store.close()


@each_store
def test_products_of_whole_tiles_are_exact_parts(name: Any) -> None:
    """Every sum is exact in float32, so the order has no effect. Pieces omit nothing and count nothing twice."""
    n, m, start = 4, 50_003, 77
    span, config = Span("w", start, start + m), TwaConfig(store=name)
    first, second = resident(config, n), offloaded(config, n, 30_000)
    signs = torch.randint(0, 2, (2, m)) * 2.0 - 1
    for store in (first, second):
        fill(store, span, 1 + torch.cat([signs, -signs]))
    gradient = torch.randint(-4, 5, (m,)).float()
    actual = [store.project(span, gradient, True) for store in (first, second)]
    assert torch.equal(*actual)
    assert actual[1][-1] == gradient.sum()


@each_store
def test_many_spans_share_two_buffers(name: Any) -> None:
    n, buffer = 4, 50_000
    torch.manual_seed(0)
    config = TwaConfig(store=name)
    stores = resident(config, n), offloaded(config, n, buffer)
    spans = [Span(str(i), i, i + m) for i, m in enumerate((3, 40_000, 0, 900, 70_001))]
    for span in spans:
        values = torch.randn(n, len(span))
        for store in stores:
            fill(store, span, values)
    for _ in range(2):
        for span in spans:
            check(*stores, span, n, True)
    stored = stores[1]._staging.nbytes
    assert stored <= 2 * (buffer + 3 * 256) < stores[1].nbytes
    stores[1].close()
    assert stores[1].nbytes == 0


def test_buffers_are_not_larger_than_their_content() -> None:
    store = offloaded(TwaConfig(), 2, 1 << 26)
    fill(store, Span("w", 0, 1000), torch.randn(2, 1000))
    assert store._staging.nbytes == 2 * (8192 + 4096)


def test_buffers_keep_their_content_until_they_are_reused() -> None:
    staging = Staging(CPU)
    tensors = [torch.arange(5.0), torch.arange(7, dtype=torch.int32), torch.ones(3, dtype=torch.bfloat16)]
    staging.reserve(tensors)
    staging.reserve(tensors[:1])
    with staging.lend(tensors) as first, staging.lend([-t for t in tensors]) as second:
        for host, first_copy, second_copy in zip(tensors, first, second, strict=True):
            assert torch.equal(first_copy, host) and torch.equal(second_copy, -host)
            assert first_copy.data_ptr() % 64 == 0 and first_copy.data_ptr() != host.data_ptr()
    with staging.lend(tensors[:1]) as third:
        assert third[0].data_ptr() == first[0].data_ptr()
    staging.close()


@pytest.mark.parametrize("name", ["dense32", "packed4", "mapped"])
def test_a_cpu_model_has_nothing_to_offload(name: Any) -> None:
    store = make_store(TwaConfig(store=name, store_device="cpu"), 2, CPU, lambda _: [])
    assert not isinstance(store, OffloadedStore) and store.device == CPU


@pytest.mark.parametrize("basis", ["normalized", "orthonormal"])
@pytest.mark.parametrize(("name", "coding"), [("dense32", "auto"), ("packed4", "center"), ("packed4", "increments")])
def test_training_with_the_public_api(monkeypatch: pytest.MonkeyPatch, name: str, coding: str, basis: str) -> None:
    """The orthonormal basis also uses the center's products."""

    def build() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 300), nn.Tanh(), nn.Linear(300, 3))

    base = build().state_dict()
    candidates = [{k: v + 0.1 * torch.randn_like(v) for k, v in base.items()} for _ in range(3)]

    def train() -> list[Tensor]:
        model = build()
        config: dict[str, Any] = {"store": name, "coding": coding, "basis": basis, "groups": "tensor"}
        config |= {"optimizer": {"name": "sgd", "lr": 0.1}}
        twa = twa_scale.attach(model, candidates, config)
        for seed in range(5):
            x = torch.randn(16, 6, generator=torch.Generator().manual_seed(seed))
            model(x).square().mean().backward()
            twa.step()
            twa.zero_grad()
        twa.close()
        return [twa.coefficients, *(p.detach().clone() for p in model.parameters())]

    expected = train()
    made: list[OffloadedStore] = []

    def make(config: TwaConfig, n: int, device: torch.device, mapped: object, coding: Coding) -> Store:
        made.append(offloaded(config, n, 2000, coding))
        return made[-1]

    monkeypatch.setattr(import_module("twa_scale.average.attach"), "make_store", make)
    for first, second in zip(train(), expected, strict=True):
        torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-6)
    assert len(made) == 1 and made[0]._staging.nbytes > 0
