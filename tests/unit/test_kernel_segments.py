"""Project and combine with sums and weights for each segment (output row), for all kernels and stores."""

from collections.abc import Sequence
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.deltas import fill
from tests.grid import rest_slow
from tests.unit.test_kernels import KERNELS, KINDS, LENGTHS, bounds, exact, make, step
from twa_scale.base.spans import Span
from twa_scale.config import TwaConfig, validated
from twa_scale.kernels import Kernels, Rows, Segments, choose_kernels
from twa_scale.kernels.numba.compiled import NumbaKernels
from twa_scale.store import Store, in_memory, make_store
from twa_scale.store.make import host_store
from twa_scale.store.offloaded import OffloadedStore

CPU = torch.device("cpu")
SIZES = st.sampled_from([1, 2, 27, 64, 100, 128, 500, 768, 1024, 5000, 1 << 40])


def segment_of(segments: Segments) -> Tensor:
    """Return the segment of each column."""
    return (torch.arange(segments.m) + segments.lead) // segments.length


def sums_of(values: Tensor, segments: Segments) -> Tensor:
    """Return the sums over each segment, (n, count)."""
    total = torch.zeros(len(values), segments.count, dtype=values.dtype)
    return total.index_add_(1, segment_of(segments), values)


def check_segments(kernels: Kernels, rows: Rows, segments: Segments, dtypes: Sequence[torch.dtype] = ()) -> None:
    """Compare `project` and `combine` with float64, with each other, and with the results without segments."""
    values, half, of = exact(rows), step(kernels, rows), segment_of(segments)
    (n, m), count = values.shape, segments.count
    gradient, weights, base = torch.randn(m), torch.randn(n, count), torch.randn(m)
    size, g, w = bounds(rows, values), gradient.double().abs(), weights.double().abs()
    actual = kernels.project(rows, gradient, segments)
    assert actual.dtype == torch.float64 and actual.shape == (n, count)
    off = 2e-6 * sums_of(size * g, segments) + half * sums_of(size, segments) * (g.amax() if m else 0) + 1e-30
    assert ((actual - sums_of(values * gradient.double(), segments)).abs() <= off).all()
    assert ((actual.sum(1) - kernels.project(rows, gradient)).abs() <= 2 * off.sum(1)).all()
    wider = torch.full((count, n + 1), 3.0, dtype=torch.float64)  # the last column is that of the center
    kernels.project(rows, gradient, segments, wider.T[:-1])
    assert torch.equal(wider[:, :-1], actual.T)  # whatever was in this memory
    assert (wider[:, -1] == 3).all()
    out, each = torch.full((m,), torch.nan), w[:, of] * size
    kernels.combine(rows, weights, base, 0.7, out, segments)
    expected = 0.7 * base.double() + (weights[:, of].double() * values).sum(0)
    above = 3e-6 * (each.sum(0) + base.abs()) + half * n * torch.maximum(each.amax(0), each.sum(0) / 128) + 1e-30
    assert ((out.double() - expected).abs() <= above).all()
    for dtype in dtypes:
        rounded = torch.full((m,), torch.nan, dtype=dtype)
        kernels.combine(rows, weights, base, 0.7, rounded, segments)
        room = 0 if kernels.name != "triton" else torch.finfo(dtype).eps  # Triton's interpreter truncates.
        torch.testing.assert_close(rounded, out.to(dtype), rtol=room, atol=0)


@pytest.mark.parametrize(
    ("kernels", "kind"),
    rest_slow(product(KERNELS, KINDS), lambda kernels, kind: (kernels.name, kind) != ("numba", "packed2")),  # compiles
    ids=lambda value: getattr(value, "name", value),
)
@settings(max_examples=25)
@given(
    data=st.data(),
    n=st.one_of(st.integers(1, 9), st.sampled_from([16, 17, 40])),
    m=LENGTHS,
    start=st.integers(0, 300),
    length=SIZES,
    seed=st.integers(0, 99),
)
def test_against_float64(
    kernels: Kernels, kind: str, data: st.DataObject, n: int, m: int, start: int, length: int, seed: int
) -> None:
    torch.manual_seed(seed)
    lead = data.draw(st.integers(0, min(length, 6000) - 1))
    # One kind of packed rows suffices for other types of weights, because numba compiles for each type.
    dtypes = [torch.bfloat16, torch.float16] if kind in ("packed4", "float32", "differences") else []
    check_segments(kernels, make(kind, torch.randn(n, m), start), Segments(length, lead, m), dtypes)


@pytest.mark.parametrize("kind", ["float32", "packed4", "packed1"])
@pytest.mark.parametrize("kernels", KERNELS, ids=lambda kernels: kernels.name)
@pytest.mark.parametrize("column", [0, 255, 256, 270, 4000])
def test_a_gradient_that_is_not_finite_reaches_its_own_segment_only(kernels: Kernels, kind: str, column: int) -> None:
    torch.manual_seed(0)
    segments, gradient = Segments(100, 30, 5000), torch.randn(5000)
    gradient[column] = torch.nan
    finite = kernels.project(make(kind, torch.randn(17, 5000), 7), gradient, segments).isfinite()
    assert finite.sum() == 17 * (segments.count - 1) and not finite[:, segment_of(segments)[column]].any()


@pytest.mark.parametrize("kind", ["bfloat16", "packed4", "packed1", "differences"])
@pytest.mark.parametrize("length", [1000, 70_000])
def test_threads_do_not_change_results(kind: str, length: int) -> None:
    """Several threads add to the sums of the segments that their ranges share."""
    torch.manual_seed(0)
    m, fast, before = 400_003, NumbaKernels(), torch.get_num_threads()
    rows, segments, gradient, base = make(kind, torch.randn(8, m), 50), Segments(length, 55, m), *torch.randn(2, m)
    weights = torch.randn(8, segments.count)
    try:
        actual, outs = [], []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            actual.append(fast.project(rows, gradient, segments))
            outs.append(torch.empty(m))
            fast.combine(rows, weights, base, 0.7, outs[-1], segments)
    finally:
        torch.set_num_threads(before)
    for sums, out in zip(actual[1:], outs[1:], strict=True):
        torch.testing.assert_close(sums, actual[0], rtol=0, atol=1e-10 * float(actual[0].abs().max()) + 1e-9)
        assert torch.equal(out, outs[0])


@given(data=st.data(), length=SIZES, m=st.integers(0, 3000))
def test_parts_of_segments(data: st.DataObject, length: int, m: int) -> None:
    segments = Segments(length, data.draw(st.integers(0, min(length, 6000) - 1)), m)
    start = data.draw(st.integers(0, m))
    stop = data.draw(st.integers(start, m))
    first, part = segments.part(start, stop)
    assert torch.equal(segment_of(part) + first, segment_of(segments)[start:stop])
    assert segments.count == (int(segment_of(segments)[-1]) + 1 if m else 0)


STORES = ["dense32", "dense16", "packed8", "packed4", "packed2", "packed1", "mapped", "offloaded"]


def stores_of(name: str, values: Tensor, span: Span) -> Store:
    """Return a filled store for candidates (n, m)."""
    n = len(values)
    whole = torch.zeros(n, span.stop)
    whole[:, [span.element(i) for i in range(len(span))]] = values
    if name == "offloaded":  # in pieces of one run of tiles
        config = TwaConfig(store="packed4")
        store: Store = OffloadedStore(
            lambda allocate: host_store(config, n, allocate), CPU, choose_kernels("auto", CPU), buffer=0
        )
    else:
        store = make_store(validated(TwaConfig, {"store": name}), n, CPU, lambda _: list(whole))
    fill(store, span, values)
    return store


@pytest.mark.parametrize("name", rest_slow([(name,) for name in STORES], lambda name: name != "packed2"))
@pytest.mark.parametrize("length", [27, 768, 5000])
@pytest.mark.parametrize("span", [Span("w", 300, 4800), Span("w", 30, 4530, 50, 90)], ids=["range", "strided"])
def test_stores(name: str, length: int, span: Span, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows and center are those that `combine` without segments gives. Segments count elements of a strided span."""
    torch.manual_seed(0)
    monkeypatch.setattr(in_memory, "_CPU_SUMS", 0)  # pieces of one run of tiles
    n, m = 3, len(span)
    store, segments, gradient = stores_of(name, torch.randn(n, m), span), Segments(length, 11, m), torch.randn(m)
    stored = torch.empty(n + 1, m)
    for row, weights in zip(stored, torch.eye(n + 1), strict=True):
        store.combine(span, weights[:-1], float(weights[-1]), row)
    for with_center in (False, True):
        actual = torch.zeros(n + 1, segments.count, dtype=torch.float64)
        for sums in store.project_rows(span, gradient, with_center, segments):
            actual[:, sums.segments] += sums.products
        expected = sums_of((stored * gradient).double(), segments)
        expected[-1] *= with_center
        torch.testing.assert_close(actual, expected, rtol=2e-3, atol=0.02)
    weights, out = torch.randn(n, segments.count), torch.empty(m)
    store.combine(span, weights, 0.7, out, segments)
    expected = 0.7 * stored[-1] + (weights[:, segment_of(segments)] * stored[:-1]).sum(0)
    torch.testing.assert_close(out, expected, rtol=2e-3, atol=2e-3)
    store.close()
