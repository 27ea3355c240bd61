"""Candidates read ahead by threads, and the kernels that make deltas of them, against plain float64."""

import os
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from twa_scale import CandidateError
from twa_scale.config import TwaConfig, validated
from twa_scale.errors import ConfigError
from twa_scale.kernels import Kernels, Sources
from twa_scale.kernels.checksum import checksum
from twa_scale.kernels.compiled import NumbaKernels
from twa_scale.kernels.reference import TorchKernels
from twa_scale.sources import open_candidates
from twa_scale.spans import Span
from twa_scale.streaming import Stream

CPU = torch.device("cpu")
KERNELS: list[Kernels] = [TorchKernels(), NumbaKernels()]
both = pytest.mark.parametrize("kernels", KERNELS, ids=lambda kernels: kernels.name)
HALVES = ["bfloat16", "float16"]


def sources(n: int, m: int, kind: str) -> Sources:
    """Rows cut out of wider ones, as they lie in the buffers."""
    torch.manual_seed(n + m)
    wide = torch.randn(1, m + 7) + 1e-3 * torch.randn(n, m + 7)
    if kind == "mixed":
        return [row[:m].to(getattr(torch, HALVES[i % 2])) for i, row in enumerate(wide)]
    return wide.to(getattr(torch, kind))[:, :m]


@both
@pytest.mark.parametrize("kind", ["bfloat16", "float16", "float32", "float64", "mixed"])
@pytest.mark.parametrize(("n", "m"), [(1, 1), (2, 511), (3, 513), (5, 3000), (16, 1024), (17, 70_001)])
def test_deltas_center_and_products(kernels: Kernels, kind: str, n: int, m: int) -> None:
    given = sources(n, m, kind)
    weights = torch.rand(n, dtype=torch.float64)
    weights /= weights.sum()
    dtype = torch.float64 if kind == "float64" else torch.float32
    rows = torch.full((n + 1, m + 33), float("nan"), dtype=dtype)[:, :m]
    kernels.center(given, weights.tolist(), rows)
    exact = torch.stack([row.double() for row in given])
    center = weights @ exact
    torch.testing.assert_close(rows[-1].double(), center, rtol=2e-7, atol=1e-8)
    torch.testing.assert_close(rows[:-1].double(), exact - center, rtol=0, atol=3e-9)
    products = kernels.gram(rows)
    wide = rows.double()
    torch.testing.assert_close(products, wide @ wide.T, rtol=1e-12, atol=1e-12 * float(wide[-1] @ wide[-1]))
    torch.testing.assert_close(kernels.squares(rows), products.diagonal(), rtol=1e-12, atol=0)
    assert kernels.checksums(given).tolist() == [checksum(row.contiguous()) for row in given]


@pytest.mark.parametrize("kind", ["bfloat16", "float32"])
def test_deltas_do_not_depend_on_the_columns_beside_them(kind: str) -> None:
    """Vectors and what is left over compute alike, so that codes do not depend on chunks or ranks."""
    given = sources(5, 1000, kind)
    weights = [0.1, 0.2, 0.3, 0.15, 0.25]
    whole, part = torch.empty(6, 1000), torch.empty(6, 1000)
    kernels = NumbaKernels()
    kernels.center(given, weights, whole)
    for start, stop in ((0, 1), (3, 20), (5, 69), (100, 163), (7, 1000)):
        kernels.center(given[:, start:stop].contiguous(), weights, part[:, : stop - start])
        assert torch.equal(part[:, : stop - start], whole[:, start:stop])


@both
@pytest.mark.parametrize("kind", ["bfloat16", "float32"])
def test_where_candidates_agree_deltas_are_zero_and_the_center_has_their_bits(kernels: Kernels, kind: str) -> None:
    row = (1e3 * torch.randn(1, 2000)).to(getattr(torch, kind))
    rows = torch.empty(8, 2000)
    kernels.center(row.expand(7, -1).contiguous(), [0.1, 0.2, 0.05, 0.3, 0.15, 0.1, 0.1], rows)
    assert not rows[:-1].any() and torch.equal(rows[-1], row[0].float())


def written(folder: Path, tensors: list[dict[str, Tensor]]) -> list[str]:
    paths = [str(folder / f"{i}.safetensors") for i in range(len(tensors))]
    for path, state in zip(paths, tensors, strict=True):
        save_file(state, path)
    return paths


@pytest.mark.parametrize("in_flight", [1, 3, 8])
def test_small_reads_of_any_spans_give_what_the_files_hold(tmp_path: Path, in_flight: int) -> None:
    """Contiguous, strided and empty spans, cut by reads of 4 KiB; integers come from the last candidate."""
    n = 5
    states = [
        {"a": torch.randn(100, 130).bfloat16(), "b": torch.randn(7000), "i": torch.arange(3000) + k} for k in range(n)
    ]
    candidates = open_candidates(written(tmp_path, states))
    seen: list[int] = []
    progress = lambda nbytes, _: seen.append(nbytes)  # noqa: E731
    stream = Stream(candidates, CPU, progress=progress, read_chunk=4096, reads_in_flight=in_flight)
    spans = [Span("a", 0, 9000), Span("b", 5, 5), Span("b", 1, 7000), Span("a", 9010, 9010 + 29 * 130 + 65, 65, 130)]
    found = {span: torch.full((n + 1, len(span)), float("nan")) for span in spans}
    for chunk in stream.chunks(spans, [1 / n] * n):
        found[chunk.span][:, chunk.start : chunk.start + len(chunk.center)] = chunk.rows
    for span, rows in found.items():
        parts = [[state[span.name].flatten()[i:j].double() for i, j in span.runs()] for state in states]
        exact = torch.stack([torch.cat(part) for part in parts])
        torch.testing.assert_close((rows[:-1] + rows[-1]).double(), exact, rtol=1e-6, atol=1e-6)
    assert sum(seen) == sum(candidate.bytes_read for candidate in candidates)
    assert sum(seen) == n * sum(len(span) * states[0][span.name].itemsize for span in spans)
    sums = [checksum(state["b"][1:].contiguous()) for state in states]
    assert stream.checksums["b"].tolist() == sums
    whole = torch.cat([values.clone() for _, _, values in stream.copies([Span("i", 0, 3000)])])
    assert torch.equal(whole, states[-1]["i"])
    assert stream.checksums["i"].tolist() == [0] * (n - 1) + [checksum(whole)]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_named_wherever_it_is(tmp_path: Path, value: float) -> None:
    states = [{"w": torch.randn(200_000).bfloat16()} for _ in range(3)]
    states[1]["w"][150_001] = value
    stream = Stream(open_candidates(written(tmp_path, states)), CPU, read_chunk=1 << 16)
    with pytest.raises(CandidateError, match=r"1\.safetensors: tensor 'w' holds \w+ at element 150001;"):
        list(stream.chunks([Span("w", 3, 200_000)], [0.5, 0.0, 0.5]))


def test_a_file_that_shrinks_is_named_and_no_thread_stays(tmp_path: Path) -> None:
    paths = written(tmp_path, [{"w": torch.randn(100_000)} for _ in range(2)])
    candidates = open_candidates(paths)
    stream = Stream(candidates, CPU, read_chunk=1 << 16)
    with pytest.raises(CandidateError, match=r"1\.safetensors"):
        for chunk in stream.chunks([Span("w", 0, 100_000)], [0.5, 0.5]):
            if chunk.start == 0:
                os.truncate(paths[1], 200_000)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("twa-scale-read")]


@pytest.mark.parametrize(("key", "value"), [("read_chunk", 100), ("reads_in_flight", 0), ("reads_in_flight", 1000)])
def test_settings_out_of_range(key: str, value: int) -> None:
    with pytest.raises(ConfigError, match=key):
        validated(TwaConfig, {key: value})
