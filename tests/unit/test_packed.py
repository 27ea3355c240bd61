"""Packed and mapped stores: the precision of quantization, and independence of chunks and splits."""

from collections.abc import Sequence
from functools import cache
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn

import twa_scale
from tests.deltas import fill, packed
from twa_scale import ConfigError
from twa_scale.base.spans import Span
from twa_scale.config import TwaConfig, load_config, validated
from twa_scale.config.kinds import StoreName
from twa_scale.kernels import Kernels, Packed
from twa_scale.kernels.numba.compiled import NumbaKernels
from twa_scale.kernels.packed_rows import BLOCKS
from twa_scale.kernels.torch.reference import TorchKernels, unpack
from twa_scale.run.tasks import build_task, stack
from twa_scale.store import Store, make_store, span_bytes

CPU = torch.device("cpu")
KERNELS: list[Kernels] = [TorchKernels(), NumbaKernels()]
BITS = [8, 4, 2, 1]
LEAST = {8: 0.9999, 4: 0.98, 2: 0.7, 1: 0.5}
ROOT = Path(__file__).resolve().parents[2]
each_kernels = pytest.mark.parametrize("kernels", KERNELS, ids=lambda kernels: kernels.name)
each_bits = pytest.mark.parametrize("bits", BITS)


def unpacked(rows: Packed) -> Tensor:
    tiles = [unpack(words, scales, rows.bits) for _, words, scales in rows.tiles(0, rows.count)]
    return torch.cat([tile.transpose(0, 1).flatten(1) for tile in tiles], 1)[:, rows.lead : rows.lead + rows.m]


def cosine(x: Tensor, y: Tensor) -> float:
    return float(x.double() @ y.double() / (x.double().norm() * y.double().norm()))


def deltas(kind: str) -> Tensor:
    torch.manual_seed(0)
    if kind == "gaussian":
        return torch.randn(2, 200_000) * 1e-3
    if kind == "student-t":
        return torch.distributions.StudentT(torch.tensor(3.0)).sample((2, 200_000)) * 1e-3
    return trained()


@cache
def trained() -> Tensor:
    """Return deltas of the quickstart's model after some steps on its text."""
    task = build_task(load_config(ROOT / "configs/quickstart.yaml").task)
    torch.manual_seed(0)
    model = task.model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    data, weights = task.dataset("train"), []
    for step in range(30):
        task.loss(model, stack([data[4 * step + i] for i in range(4)])).backward()
        optimizer.step()
        optimizer.zero_grad()
        if step >= 20 and step % 2:
            weights.append(nn.utils.parameters_to_vector(model.parameters()).detach())
    return torch.stack(weights) - torch.stack(weights).mean(0)


@each_kernels
@each_bits
@pytest.mark.parametrize("kind", ["gaussian", "student-t", "real"])
def test_rows_keep_their_direction(kernels: Kernels, bits: int, kind: str) -> None:
    values = deltas(kind)
    kept = unpacked(packed(values, bits, kernels))
    cosines = [cosine(*pair) for pair in zip(values, kept, strict=True)]
    assert min(cosines) > LEAST[bits], cosines
    if bits >= 4:  # nothing is clipped
        gains = (kept.double() * values).sum(1) / values.double().square().sum(1)
        assert (gains - 1).abs().max() < 0.01, gains


@each_bits
@settings(max_examples=25)
@given(m=st.integers(1, 3000), start=st.integers(0, 500), exponent=st.integers(-20, 15), seed=st.integers(0, 99))
def test_kernels_agree(bits: int, m: int, start: int, exponent: int, seed: int) -> None:
    """The rounding of ties depends on the order of sums. It differs rarely, and by one step."""
    torch.manual_seed(seed)
    values = torch.randn(3, m) * 10.0**exponent
    first, second = (unpacked(packed(values, bits, kernels, start)) for kernels in KERNELS)
    assert ((first - second).abs() <= values.abs().amax() * 2.1 / (1 << bits)).all()
    assert (first != second).sum() <= 3 + 128 + 1e-3 * first.numel()


@each_kernels
@settings(max_examples=25)
@given(m=st.integers(1, 2500), start=st.integers(0, 200), seed=st.integers(0, 99))
def test_error_of_8_bits_is_half_a_step(kernels: Kernels, m: int, start: int, seed: int) -> None:
    torch.manual_seed(seed)
    values = torch.randn(2, m)
    off = (unpacked(packed(values, 8, kernels, start)) - values).abs()
    size, lead = BLOCKS[8], start % BLOCKS[8]
    for first in range(-lead, m, size):
        block = slice(max(first, 0), first + size)
        step = values[:, block].abs().amax(1, keepdim=True) / 127 * 1.004  # the scale has 8 bits
        assert (off[:, block] <= 0.501 * step).all()


@each_kernels
@each_bits
class TestUglyBlocks:
    def test_zeros_stay_zeros(self, kernels: Kernels, bits: int) -> None:
        values = torch.zeros(2, 700)
        values[1, 300:] = 1
        assert not unpacked(packed(values, bits, kernels))[0].any()
        assert not unpacked(packed(values, bits, kernels))[1, :256].any()

    def test_constant_rows_are_quantized_without_noise(self, kernels: Kernels, bits: int) -> None:
        for value in (1.0, -3.0, 1e-9, -1e-9, 1e-25, 1e25):
            kept = unpacked(packed(torch.full((1, 300), value), bits, kernels))
            torch.testing.assert_close(kept, torch.full((1, 300), value), rtol=0.02, atol=0)

    def test_denormals_become_zero(self, kernels: Kernels, bits: int) -> None:
        assert not unpacked(packed(torch.full((1, 300), 1e-40), bits, kernels)).any()

    def test_large_element_affects_only_its_block(self, kernels: Kernels, bits: int) -> None:
        torch.manual_seed(0)
        values = torch.randn(1, 1024)
        large = values.clone()
        large[0, 600] = 1e6
        first, second = unpacked(packed(values, bits, kernels)), unpacked(packed(large, bits, kernels))
        assert torch.equal(first[0, :512], second[0, :512]) and torch.equal(first[0, 640:], second[0, 640:])


@each_kernels
@pytest.mark.parametrize("bits", [8, 4])
def test_extremes_of_both_signs_are_not_clipped(kernels: Kernels, bits: int) -> None:
    """Deltas of one step of a sign-based optimizer have two values. Clipping one of them would bias all products."""
    torch.manual_seed(0)
    signs = torch.randn(2, 3000).sign() * torch.tensor([[1e-3], [2.0]])
    torch.testing.assert_close(unpacked(packed(signs, bits, kernels)), signs, rtol=0.005, atol=0)
    skewed = torch.where(signs > 0, signs, 0.9 * signs)
    torch.testing.assert_close(
        unpacked(packed(skewed, bits, kernels)), skewed, rtol=0.04 if bits == 4 else 0.006, atol=0
    )


def test_exact_zeros_are_kept() -> None:
    """With 8 and 4 bits, unused rows of an embedding do not change."""
    torch.manual_seed(0)
    values = torch.zeros(1, 512)
    values[0, ::7] = torch.randn(74)
    for bits in (8, 4):
        kept = unpacked(packed(values, bits, KERNELS[1]))
        assert not kept[values == 0].any() and kept[0, 0] != 0


def store_of(name: str, n: int, kernels: str = "auto") -> Store:
    return make_store(validated(TwaConfig, {"store": name, "kernels": kernels}), n, CPU, lambda name: [])


def contents(store: Store, span: Span, n: int) -> Tensor:
    """Return the rows by combining with unit weights without the center, and the center as the last row."""
    out = torch.empty(n + 1, len(span))
    for i, row in enumerate(out):
        weights = torch.zeros(n)
        weights[: i + 1][i:] = 1
        store.combine(span, weights, float(i == n), row)
    return out


@each_bits
@settings(max_examples=20)
@given(data=st.data(), m=st.integers(0, 1500), start=st.integers(0, 700))
def test_rows_do_not_depend_on_chunks(bits: int, data: st.DataObject, m: int, start: int) -> None:
    torch.manual_seed(m)
    span, values = Span("w", start, start + m), torch.randn(3, m)
    borders = range(128 - start % 128, m, 128)
    parts = sorted(data.draw(st.lists(st.sampled_from(borders), max_size=8))) if borders else []
    filled = []
    for pieces in ([], parts):
        store = store_of(f"packed{bits}", 3)
        fill(store, span, values, pieces)
        filled.append(contents(store, span, 3))
    assert torch.equal(*filled)
    torch.testing.assert_close(filled[0][3], values.mean(0))


@each_bits
@pytest.mark.parametrize("part", [1024, 1000, 64, 5])
def test_splits_affect_only_the_block_that_they_split(bits: int, part: int) -> None:
    torch.manual_seed(0)
    m, size = 3000, BLOCKS[bits]
    values = torch.randn(2, m)

    def held(*spans: Span) -> Tensor:
        store, parts = store_of(f"packed{bits}", 2), []
        for span in spans:
            fill(store, span, values[:, span.start : span.stop])
            parts.append(contents(store, span, 2))
        return torch.cat(parts, 1)

    whole, split = held(Span("w", 0, m)), held(Span("w", 0, part), Span("w", part, m))
    same = torch.ones(m, dtype=torch.bool)
    if part % size:
        same[part // size * size : (part // size + 1) * size] = False
    assert torch.equal(whole[:, same], split[:, same])


@pytest.mark.parametrize("name", ["dense32", "dense16", "packed8", "packed4", "packed2", "packed1"])
@pytest.mark.parametrize("m", [0, 1, 130, 5000])
def test_bytes_equal_those_of_plan(name: StoreName, m: int) -> None:
    store = store_of(name, 5)
    store.reserve(Span("w", 0, m))
    assert store.nbytes == span_bytes(name, 5, m)


def test_bytes_of_many_elements() -> None:
    million = 1 << 20
    assert span_bytes("packed4", 16, million) == million * (4 + 16 * (4 / 8 + 2 / 64))
    assert span_bytes("packed8", 16, million) == million * (4 + 16 * (1 + 2 / 64))


@pytest.mark.parametrize("span", [Span("w", 0, 600), Span("w", 37, 411), Span("w", 3, 3), Span("w", 4, 584, 5, 20)])
@pytest.mark.parametrize("with_center", [False, True])
def test_mapped_rows_are_differences(span: Span, with_center: bool) -> None:
    torch.manual_seed(0)
    tensors = [torch.randn(600), torch.randn(600).bfloat16(), torch.randn(600).double()]
    location = torch.tensor([i for start, stop in span.runs() for i in range(start, stop)], dtype=torch.long)
    rows = torch.stack([tensor[location].double() for tensor in tensors])
    center = rows.mean(0).float()
    for kernels in ("torch", "numba"):
        store = make_store(TwaConfig(store="mapped", kernels=kernels), 3, CPU, lambda _: tensors)
        target = store.reserve(span)
        assert target.rows is None and target.center is not None
        target.center.copy_(center)
        gradient, u = torch.randn(len(span)), torch.randn(3)
        expected = (rows - center) @ gradient.double()
        actual = store.project(span, gradient, with_center)
        torch.testing.assert_close(actual[:-1], expected, rtol=1e-5, atol=1e-5)
        last = center.double() @ gradient.double() * with_center
        torch.testing.assert_close(actual[-1], last, rtol=1e-5, atol=1e-5)
        out = torch.empty(len(span))
        store.combine(span, u, 0.9, out)
        torch.testing.assert_close(out.double(), 0.9 * center + u.double() @ (rows - center), rtol=1e-5, atol=1e-5)


def test_mapped_equals_dense32(tmp_path: Path) -> None:
    """Through `attach`, from bfloat16 and float32 files, which do not change."""

    def build() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 300), nn.Tanh(), nn.Linear(300, 3))

    files = []
    base = build().state_dict()
    for i in range(3):
        dtype = torch.bfloat16 if i == 1 else torch.float32
        state = {k: (v + 0.1 * torch.randn_like(v)).to(dtype) for k, v in base.items()}
        save_file(state, tmp_path / f"{i}.safetensors")
        files.append(tmp_path / f"{i}.safetensors")
    before = [file.read_bytes() for file in files]
    ended: list[Sequence[Tensor]] = []
    for store in ("dense32", "mapped"):
        model = build()
        config = {"store": store, "groups": "tensor", "optimizer": {"name": "sgd", "lr": 0.1}}
        twa = twa_scale.attach(model, files, config)
        for seed in range(5):
            x = torch.randn(16, 6, generator=torch.Generator().manual_seed(seed))
            model(x).square().mean().backward()
            twa.step()
        ended.append([p.detach().clone() for p in model.parameters()])
        if store == "mapped":
            assert twa.store_bytes == 4 * sum(p.numel() for p in model.parameters())
        twa.close()
    for first, second in zip(*ended, strict=True):
        torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-6)
    assert [file.read_bytes() for file in files] == before


def test_mapped_needs_contiguous_tensors() -> None:
    model = nn.Linear(3, 2)
    states = [{"weight": torch.randn(3, 2).T, "bias": torch.zeros(2)} for _ in range(2)]
    with pytest.raises(ConfigError, match=r"store: 'mapped'.*weight.*state dict 0.*packed8"):
        twa_scale.attach(model, states, {"store": "mapped"})
