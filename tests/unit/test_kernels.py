"""Project and combine of all kernels, on all kinds of rows, against float64."""

import logging
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.deltas import packed
from twa_scale.kernels import Dense, Differences, Kernels, Packed, Rows, Target, choose_kernels
from twa_scale.kernels.numba.compiled import NumbaKernels
from twa_scale.kernels.torch.reference import TorchKernels, unpack

CPU = torch.device("cpu")
KERNELS: list[Kernels] = [TorchKernels(), NumbaKernels()]
KINDS = ["float32", "bfloat16", "packed8", "packed4", "packed2", "packed1", "differences"]
LENGTHS = st.one_of(st.integers(0, 600), st.sampled_from([1023, 1024, 1025, 2048, 4096, 5000, 20_001]))
kernels_and_kinds = pytest.mark.parametrize("kind", KINDS)


def exact(rows: Rows) -> Tensor:
    """Return the rows after rounding, (n, m), float64."""
    match rows:
        case Dense():
            tiles = [part.transpose(0, 1).flatten(1) for _, part in rows.tiles(0, rows.m)]
            return torch.cat([*tiles, torch.empty(rows.n, 0)], 1).double()
        case Packed():
            parts = [unpack(words, scales, rows.bits) for _, words, scales in rows.tiles(0, rows.count)]
            columns = torch.cat([*(part.transpose(0, 1).flatten(1) for part in parts), torch.empty(rows.n, 0)], 1)
            return columns[:, rows.lead : rows.lead + rows.m].double()
        case _:
            return torch.stack([row.float() - rows.center for row in rows.rows]).double()


def make(kind: str, values: Tensor, start: int = 0, kernels: Kernels = KERNELS[0]) -> Rows:
    n, m = values.shape
    if kind == "differences":
        center = torch.linspace(-1, 1, m)
        return Differences(
            [row.add(center).to([torch.float32, torch.bfloat16][i % 2]) for i, row in enumerate(values)], center
        )
    if kind.startswith("packed"):
        return packed(values, int(kind[6:]), kernels, start)
    dense = Dense.empty(n, m, getattr(torch, kind), CPU)
    dense.write(0, values)
    return dense


def bounds(rows: Rows, values: Tensor) -> Tensor:
    """Return the largest magnitude in float32 sums for each element: a code is up to 2^(bits-1) scales."""
    if isinstance(rows, Packed) and rows.m:
        return values.abs().amax(1, keepdim=True).expand_as(values) * 2
    return values.abs() + 1e-30


def step(kernels: Kernels, rows: Rows) -> float:
    """Return half a step of the 16-bit integers that numba multiplies with codes, in units of the largest."""
    if kernels.name != "numba" or not isinstance(rows, Packed):
        return 0.0
    return 0.5 / (32767 if rows.bits >= 4 else 16383)


def check(kernels: Kernels, rows: Rows, gradient: Tensor, weights: Tensor, base: Tensor) -> None:
    values, half = exact(rows), step(kernels, rows)
    size, g, w = bounds(rows, values), gradient.double().abs(), weights.double().abs()
    actual = torch.full((len(values),), torch.nan, dtype=torch.float64)
    kernels.project(rows, gradient, out=actual)
    assert kernels.project(rows, gradient).dtype == torch.float64
    off = 2e-6 * (size @ g) + half * size.sum(1) * (g.amax() if len(g) else 0) + 1e-30
    assert ((actual - values @ gradient.double()).abs() <= off).all()
    expected = 0.7 * base.double() + weights.double() @ values
    each = w[:, None] * size
    above = 3e-6 * (each.sum(0) + base.abs()) + half * len(w) * torch.maximum(each.amax(0), each.sum(0) / 128) + 1e-30
    out = torch.full_like(base, torch.nan)
    kernels.combine(rows, weights, base, 0.7, out)
    assert ((out.double() - expected).abs() <= above).all()
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        rounded = torch.full_like(base, torch.nan, dtype=dtype)
        kernels.combine(rows, weights, base, 0.7, rounded)
        # Triton's interpreter truncates where the GPU rounds.
        room = 0 if kernels.name != "triton" else torch.finfo(dtype).eps
        torch.testing.assert_close(rounded, out.to(dtype), rtol=room, atol=0)
    # The adjoint: <project(g), u> = <g, combine(u)> around a center of zero.
    kernels.combine(rows, weights, torch.zeros_like(base), 0.0, out)
    left, right = actual @ weights.double(), gradient.double() @ out.double()
    assert (left - right).abs() <= w @ off + g @ above


@kernels_and_kinds
@pytest.mark.parametrize("kernels", KERNELS, ids=lambda kernels: kernels.name)
@settings(max_examples=25)
@given(
    n=st.integers(1, 9), m=LENGTHS, start=st.integers(0, 300), seed=st.integers(0, 99), magnitude=st.integers(-12, 6)
)
def test_against_float64(kernels: Kernels, kind: str, n: int, m: int, start: int, seed: int, magnitude: int) -> None:
    torch.manual_seed(seed)
    rows = make(kind, torch.randn(n, m) * 10.0**magnitude, start, kernels)
    check(kernels, rows, torch.randn(m), torch.randn(n), torch.randn(m))


@kernels_and_kinds
@pytest.mark.parametrize("kernels", KERNELS, ids=lambda kernels: kernels.name)
def test_a_thousand_rows(kernels: Kernels, kind: str) -> None:
    torch.manual_seed(0)
    check(kernels, make(kind, torch.randn(1000, 1500), 7), torch.randn(1500), torch.randn(1000), torch.randn(1500))


@kernels_and_kinds
def test_threads_do_not_change_results(kind: str) -> None:
    """Results of several ranges are bitwise equal for any number of torch's threads."""
    torch.manual_seed(0)
    m, fast, before = 400_003, NumbaKernels(), torch.get_num_threads()
    rows, (gradient, base), weights = make(kind, torch.randn(8, m), 50), torch.randn(2, m), torch.randn(8)
    try:
        actual = []
        for threads in (1, 2, 3, 2):
            torch.set_num_threads(threads)
            combined = [torch.full((m,), torch.nan, dtype=dtype) for dtype in (torch.float32, torch.bfloat16)]
            for out in combined:
                fast.combine(rows, weights, base, 0.7, out)
            actual.append((fast.project(rows, gradient), *combined))
        check(fast, rows, gradient, weights, base)  # with two threads
    finally:
        torch.set_num_threads(before)
    assert torch.equal(actual[1][0], actual[3][0])
    for products, *combined in actual:
        torch.testing.assert_close(products, actual[0][0], rtol=0, atol=1e-10 * float(actual[0][0].abs().max()) + 1e-9)
        assert all(map(torch.equal, combined, actual[1][1:])), "other numbers of threads give other weights"


@pytest.mark.parametrize("bits", [8, 4, 2, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_combine_does_not_depend_on_alignment(bits: int, dtype: torch.dtype) -> None:
    """Aligned memory is written with non-temporal stores, other memory by element."""
    torch.manual_seed(0)
    m, fast = (1 << 18) + 1000, NumbaKernels()
    rows = make(f"packed{bits}", torch.randn(3, m), 5)
    weights, base = torch.randn(3), torch.randn(m)
    base[7000], base[8000] = torch.nan, torch.inf
    expected = torch.empty(m)
    TorchKernels().combine(rows, weights, base, 0.9, expected)
    actual = []
    for offset in range(0, 33):
        memory = torch.full((m + 256,), 7.0, dtype=dtype)
        out = memory[64 + offset : 64 + offset + m]
        fast.combine(rows, weights, base, 0.9, out)
        assert (memory[: 64 + offset] == 7).all() and (memory[64 + offset + m :] == 7).all()
        actual.append(out.nan_to_num(1234, 5678))
    assert all(torch.equal(item, actual[0]) for item in actual)
    torch.testing.assert_close(actual[0].float(), expected.nan_to_num(1234, 5678), rtol=0.01, atol=1e-3)


@kernels_and_kinds
@pytest.mark.parametrize("kernels", KERNELS, ids=lambda kernels: kernels.name)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_gradients_of_other_types(kernels: Kernels, kind: str, dtype: torch.dtype) -> None:
    rows, gradient = make(kind, torch.randn(3, 777)), torch.randn(777).to(dtype)
    expected = exact(rows) @ gradient.double()
    torch.testing.assert_close(
        kernels.project(rows, gradient), expected, rtol=1e-4, atol=1e-3 + 300 * step(kernels, rows)
    )


@kernels_and_kinds
@pytest.mark.parametrize("kernels", KERNELS, ids=lambda kernels: kernels.name)
@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
def test_gradient_that_is_not_finite(kernels: Kernels, kind: str, bad: float) -> None:
    gradient = torch.randn(3000)
    gradient[1234] = bad
    assert not kernels.project(make(kind, torch.randn(3, 3000)), gradient).isfinite().any()


@pytest.mark.parametrize("kernels", KERNELS, ids=lambda kernels: kernels.name)
def test_denormals_and_large_numbers(kernels: Kernels) -> None:
    values = torch.tensor([[1e-40, -3e-42, 0.0, 1e-30], [1e30, -1e30, 1e20, 0.0]])
    rows = make("float32", values)
    assert torch.equal(
        kernels.project(rows, torch.tensor([0.0, 0, 0, 2])), torch.tensor([2 * values[0, 3].double(), 0])
    )
    out = torch.empty(4)
    kernels.combine(rows, torch.tensor([1.0, 0]), torch.zeros(4), 1.0, out)
    assert torch.equal(out, values[0])


def test_dense_rows_are_written_in_any_pieces() -> None:
    values = torch.randn(3, 1000)
    for parts in ([0, 1000], [0, 1, 127, 128, 129, 400, 999, 1000], [0, 300, 556, 1000]):
        rows = Dense.empty(3, 1000, torch.float32, CPU)
        for start, stop in pairwise(parts):
            rows.write(start, values[:, start:stop])
        assert torch.equal(exact(rows), values.double())


class Operations(TorchDispatchMode):
    """A mode that counts the operations that would be launched on a GPU."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("start", [0, 5, 128])
def test_writing_rows_takes_few_operations(start: int) -> None:
    """The number of operations does not depend on the number of tiles, of which a model has millions."""
    rows = Dense.empty(3, 100_000, torch.float32, CPU)
    with Operations() as writing:
        rows.write(start, torch.randn(3, 90_001))
    target = Target(Packed.empty(3, 100_000, start, 4, CPU))
    with Operations() as packing:
        TorchKernels().make_deltas(torch.randn(3, 100_000), [1.0, 0.0, 0.0], target, 0)
    assert writing.count < 50 and packing.count < 200


class TestChoice:
    def test_auto_chooses_the_fastest(self) -> None:
        assert choose_kernels("auto", CPU).name == "numba"
        assert choose_kernels("torch", CPU).name == "torch"

    def test_missing_kernels_are_replaced_with_a_warning(
        self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        monkeypatch.setitem(sys.modules, "twa_scale.kernels.numba.compiled", None)
        with caplog.at_level(logging.WARNING, "twa_scale"):
            assert choose_kernels("numba", CPU).name == "torch"
        assert len(caplog.records) == 1 and "numba" in caplog.text

    def test_kernels_for_another_device(self, caplog: pytest.LogCaptureFixture) -> None:
        with caplog.at_level(logging.WARNING, "twa_scale"):
            assert choose_kernels("triton", CPU).name == "numba"
        assert len(caplog.records) == 1 and "triton" in caplog.text


@pytest.mark.slow
def test_triton_in_the_interpreter() -> None:
    """In a separate process, because Triton reads the variable when kernels are defined."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    program = Path(__file__).with_name("triton_check.py")
    done = subprocess.run([sys.executable, str(program)], env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    assert "all kinds agree" in done.stdout


@pytest.mark.slow
@pytest.mark.xdist_group("kernels-compiled-once")
def test_second_process_uses_the_cache(tmp_path: Path) -> None:
    """numba counts the hits and misses of its cache."""
    program = """
import torch
from twa_scale.kernels import Packed, Target, choose_kernels
from twa_scale.kernels.numba.delta_loops import delta_loop
from twa_scale.kernels.numba.packed_loops import packed_loops
kernels, cpu = choose_kernels("numba", torch.device("cpu")), torch.device("cpu")
rows = Packed.empty(2, 5, 0, 4, cpu)
kernels.make_deltas(torch.tensor([[0.0] * 5, [2.0] * 5]), [0.5, 0.5], Target(rows), 0)
assert ((kernels.project(rows, torch.ones(5)).abs() - 5).abs() < 0.1).all()
kernels.combine(rows, torch.ones(2), torch.zeros(5), 1.0, torch.empty(5))
stats = [loop.stats for loop in (*packed_loops(4, False), delta_loop(4))]
print(sum(sum(s.cache_hits.values()) for s in stats), sum(sum(s.cache_misses.values()) for s in stats))
"""
    environment = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", program]
    combined = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    for process in combined:  # ranks start at the same time
        out, _ = process.communicate(timeout=200)
        assert process.returncode == 0 and sum(map(int, out.split())) == 3
    repeated = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200, check=True)
    assert repeated.stdout.split() == ["3", "0"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "processor",
    [pytest.param(name, marks=pytest.mark.xdist_group(f"kernels-{name}")) for name in ("haswell", "generic")],
)
def test_processors_with_fewer_instructions(tmp_path: Path, processor: str) -> None:
    """LLVM compiles for a processor without the widest instructions."""
    environment = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path), "NUMBA_CPU_NAME": processor}
    files = [Path(__file__), Path(__file__).with_name("test_kernel_segments.py")]
    chosen = [f"{file}::test_against_float64[numba-packed{bits}]" for file in files for bits in (8, 4, 2, 1)]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *chosen]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0 and "8 passed" in done.stdout, done.stdout
