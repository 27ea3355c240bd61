"""Threads that read ahead, and kernels that compute deltas, compared with float64."""

import os
import threading
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.deltas import matrix
from twa_scale import CandidateError
from twa_scale.base.spans import Span
from twa_scale.candidates import open_candidates
from twa_scale.candidates.streaming import Stream
from twa_scale.config import TwaConfig, validated
from twa_scale.errors import ConfigError
from twa_scale.kernels import Dense, Kernels, Packed, Sources, Target
from twa_scale.kernels.numba.compiled import NumbaKernels
from twa_scale.kernels.torch.checksum import checksum
from twa_scale.kernels.torch.reference import TorchKernels

CPU = torch.device("cpu")
KERNELS: list[Kernels] = [TorchKernels(), NumbaKernels()]
both = pytest.mark.parametrize("kernels", KERNELS, ids=lambda kernels: kernels.name)
HALVES = ["bfloat16", "float16"]


def sources(n: int, m: int, kind: str) -> Sources:
    """Return rows that are slices of wider ones, as in the buffers."""
    torch.manual_seed(n + m)
    wide = torch.randn(1, m + 7) + 1e-3 * torch.randn(n, m + 7)
    if kind == "mixed":
        return [row[:m].to(getattr(torch, HALVES[i % 2])) for i, row in enumerate(wide)]
    return wide.to(getattr(torch, kind))[:, :m]


@both
@pytest.mark.parametrize("kind", ["bfloat16", "float16", "float32", "float64", "mixed"])
@pytest.mark.parametrize(("n", "m"), [(1, 1), (2, 511), (3, 513), (5, 3000), (16, 1024), (17, 70_001)])
def test_deltas_center_and_products(kernels: Kernels, kind: str, n: int, m: int) -> None:
    inputs = sources(n, m, kind)
    weights = torch.rand(n, dtype=torch.float64)
    weights /= weights.sum()
    dtype = torch.float64 if kind == "float64" else torch.float32
    rows, actual = Dense.empty(n, m, torch.float32, CPU), torch.full((m + 20,), float("nan"), dtype=dtype)
    products, squares = torch.zeros(n + 1, n + 1, dtype=torch.float64), torch.zeros(n + 1, dtype=torch.float64)
    seen = kernels.make_deltas(inputs, weights.tolist(), Target(rows, actual[:m], products), 0)
    assert seen.finite and actual[m:].isnan().all()
    assert seen.checksums.tolist() == [checksum(row.contiguous()) for row in inputs]
    assert kernels.checksums(inputs).tolist() == seen.checksums.tolist()
    exact = torch.stack([row.double() for row in inputs])
    center = weights @ exact
    torch.testing.assert_close(actual[:m].double(), center, rtol=2e-7, atol=1e-8)
    torch.testing.assert_close(matrix(rows).double(), exact - center, rtol=0, atol=3e-9)
    wide = torch.cat([exact - center if dtype == torch.float64 else matrix(rows).double(), actual[None, :m].double()])
    torch.testing.assert_close(products, wide @ wide.T, rtol=1e-12, atol=1e-12 * float(wide[-1] @ wide[-1]))
    for times in (1, 2):  # the kernel adds to them
        kernels.make_deltas(inputs, weights.tolist(), Target(products=squares), 0)
        torch.testing.assert_close(squares, times * products.diagonal(), rtol=1e-12, atol=0)
    kernels.make_deltas(inputs, weights.tolist(), Target(products=products), 0)
    torch.testing.assert_close(products.diagonal(), squares, rtol=1e-12, atol=0)


@pytest.mark.parametrize("kind", ["bfloat16", "float32"])
def test_deltas_do_not_depend_on_neighbouring_columns(kind: str) -> None:
    """Vector instructions and the remaining columns agree, so codes do not depend on chunks or ranks."""
    inputs = sources(5, 1000, kind)
    assert isinstance(inputs, Tensor)
    weights = [0.1, 0.2, 0.3, 0.15, 0.25]
    kernels = NumbaKernels()

    def made(start: int, stop: int) -> Tensor:
        rows, center = Dense.empty(5, stop - start, torch.float32, CPU), torch.empty(stop - start)
        kernels.make_deltas(inputs[:, start:stop].contiguous(), weights, Target(rows, center), 0)
        return torch.cat([matrix(rows), center[None]])

    for start, stop in ((0, 1), (3, 20), (5, 69), (100, 163), (7, 1000)):
        assert torch.equal(made(start, stop), made(0, 1000)[:, start:stop])


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_threads_and_parts_change_no_delta(kernels: Kernels, dtype: torch.dtype) -> None:
    """Several threads write dense rows from any column on."""
    n, m = 16, 70_001
    inputs, indices = sources(n, m, "bfloat16"), [0, 1, 130, 5000, 5001, 40_000, m]
    assert isinstance(inputs, Tensor)
    whole, parts = (Dense.empty(n, m, dtype, CPU) for _ in range(2))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        kernels.make_deltas(inputs, [1 / n] * n, Target(whole), 0)
    finally:
        torch.set_num_threads(threads)
    for low, high in pairwise(indices):
        kernels.make_deltas(inputs[:, low:high], [1 / n] * n, Target(parts), low)
    assert torch.equal(whole.values, parts.values)


@both
@pytest.mark.parametrize("kind", ["bfloat16", "float32"])
def test_equal_candidates_have_zero_deltas_and_exact_center(kernels: Kernels, kind: str) -> None:
    row = (1e3 * torch.randn(1, 2000)).to(getattr(torch, kind))
    rows, center = Dense.empty(7, 2000, torch.float32, CPU), torch.empty(2000)
    weights = [0.1, 0.2, 0.05, 0.3, 0.15, 0.1, 0.1]
    kernels.make_deltas(row.expand(7, -1).contiguous(), weights, Target(rows, center), 0)
    assert not rows.values.any() and torch.equal(center, row[0].float())


def written(folder: Path, tensors: list[dict[str, Tensor]]) -> list[str]:
    paths = [str(folder / f"{i}.safetensors") for i in range(len(tensors))]
    for path, state in zip(paths, tensors, strict=True):
        save_file(state, path)
    return paths


@pytest.mark.parametrize("in_flight", [1, 3, 8])
def test_small_reads_of_spans_are_exact(tmp_path: Path, in_flight: int) -> None:
    """Contiguous, strided and empty spans, read in pieces of 4 KiB. Integers come from the last candidate."""
    n = 5
    states = [
        {"a": torch.randn(100, 130).bfloat16(), "b": torch.randn(7000), "i": torch.arange(3000) + k} for k in range(n)
    ]
    candidates = open_candidates(written(tmp_path, states))
    seen: list[int] = []
    progress = lambda nbytes, _: seen.append(nbytes)  # noqa: E731
    stream = Stream(candidates, KERNELS[1], progress=progress, read_chunk=4096, reads_in_flight=in_flight)
    spans = [Span("a", 0, 9000), Span("b", 5, 5), Span("b", 1, 7000), Span("a", 9010, 9010 + 29 * 130 + 65, 65, 130)]
    actual = {s: Target(Dense.empty(n, len(s), torch.float32, CPU), torch.empty(len(s))) for s in spans}
    stream.make_deltas(actual, [1 / n] * n)
    for span, target in actual.items():
        assert isinstance(target.rows, Dense) and target.center is not None
        parts = [[state[span.name].flatten()[i:j].double() for i, j in span.runs()] for state in states]
        exact = torch.stack([torch.cat(part) for part in parts])
        torch.testing.assert_close((matrix(target.rows) + target.center).double(), exact, rtol=1e-6, atol=1e-6)
    assert sum(seen) == sum(candidate.bytes_read for candidate in candidates)
    assert sum(seen) == n * sum(len(span) * states[0][span.name].itemsize for span in spans)
    sums = [checksum(state["b"][1:].contiguous()) for state in states]
    assert stream.checksums["b"].tolist() == sums
    whole = torch.cat([values.clone() for _, _, values in stream.copies({Span("i", 0, 3000): n - 1})])
    assert torch.equal(whole, states[-1]["i"])
    assert stream.checksums["i"].tolist() == [checksum(state["i"]) for state in states]
    assert stream.differing == {"i": n - 1}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_value_is_named(tmp_path: Path, value: float) -> None:
    states = [{"w": torch.randn(200_000).bfloat16()} for _ in range(3)]
    states[1]["w"][150_001] = value
    stream = Stream(open_candidates(written(tmp_path, states)), KERNELS[1], read_chunk=1 << 16)
    with pytest.raises(CandidateError, match=r"1\.safetensors: tensor 'w' holds \w+ at element 150001;"):
        stream.make_deltas({Span("w", 3, 200_000): Target(center=torch.empty(199_997))}, [0.5, 0.0, 0.5])


def test_a_file_that_shrinks_is_named_and_no_thread_stays(tmp_path: Path) -> None:
    paths = written(tmp_path, [{"w": torch.randn(100_000)} for _ in range(2)])
    candidates = open_candidates(paths)
    shrink = lambda nbytes, total: os.truncate(paths[1], 200_000)  # noqa: E731
    stream = Stream(candidates, KERNELS[1], progress=shrink, read_chunk=1 << 16)
    with pytest.raises(CandidateError, match=r"1\.safetensors"):
        stream.make_deltas({Span("w", 0, 100_000): Target(center=torch.empty(100_000))}, [0.5, 0.5])
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("twa-scale-read")]


@pytest.mark.parametrize(("key", "value"), [("read_chunk", 100), ("reads_in_flight", 0), ("reads_in_flight", 1000)])
def test_settings_out_of_range(key: str, value: int) -> None:
    with pytest.raises(ConfigError, match=key):
        validated(TwaConfig, {key: value})


@both
def test_non_finite_values_are_not_written_to_live_weights(kernels: Kernels) -> None:
    """A parameter that is not trained, in the model's type, with autograd."""
    inputs = torch.ones(3, 300).bfloat16()
    inputs[1, 7] = float("nan")
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        live = torch.nn.Parameter(torch.full((300,), 5.0, dtype=dtype))
        assert not kernels.make_deltas(inputs, [0.5, 0.0, 0.5], Target(center=live), 0).finite
        assert (live == 5).all()
        assert kernels.make_deltas(inputs[:, 8:], [0.5, 0.0, 0.5], Target(center=live), 8).finite
        assert (live[8:] == 1).all() and (live[:8] == 5).all()


@both
def test_parts_of_blocks_are_refused(kernels: Kernels) -> None:
    for start, stop in ((0, 30), (30, 300), (64, 100)):
        with pytest.raises(AssertionError, match="a block"):
            target = Target(Packed.empty(2, 300, 0, 4, CPU))
            kernels.make_deltas(torch.randn(2, stop - start), [0.5, 0.5], target, start)


def test_norms_of_very_large_and_very_small_deltas() -> None:
    for size in (1e-22, 1e19):
        inputs = torch.tensor([[-size] * 300, [size] * 300])
        squares = torch.zeros(3, dtype=torch.float64)
        KERNELS[1].make_deltas(inputs, [0.5, 0.5], Target(products=squares), 0)
        torch.testing.assert_close(squares[:2] / size**2, torch.full((2,), 300.0, dtype=torch.float64))


@both
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_largest_values_are_finite(kernels: Kernels, dtype: torch.dtype) -> None:
    """The largest values, as in masks, whose sum overflows."""
    lowest, center = torch.full((2, 3000), torch.finfo(dtype).min, dtype=dtype), torch.zeros(3000, dtype=dtype)
    assert kernels.make_deltas(lowest, [0.5, 0.5], Target(center=center), 0).finite
    assert torch.equal(center, lowest[0])


def test_candidates_too_far_apart_are_refused(tmp_path: Path) -> None:
    states = [{"w": torch.full((300,), size)} for size in (3e38, -3e38)]
    center = torch.full((300,), 5.0)
    stream = Stream(open_candidates(written(tmp_path, states)), KERNELS[1])
    with pytest.raises(CandidateError, match="'w': from element 0 on, candidates differ by more than"):
        stream.make_deltas({Span("w", 0, 300): Target(center=center)}, [0.5, 0.5])
    assert (center == 5).all()
