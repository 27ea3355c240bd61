"""Codings of packed rows: their maps, their rounding errors, and the automatic choice."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn

import twa_scale
from tests.deltas import packed_rows
from twa_scale import ConfigError
from twa_scale.average.bases import Orthonormal
from twa_scale.base.spans import Span
from twa_scale.candidates import open_candidates
from twa_scale.candidates.rounding import choose_coding
from twa_scale.config import TwaConfig, center_weights, validated
from twa_scale.kernels import Coding, Kernels, Packed, Target, of_deltas, of_increments
from twa_scale.kernels.coding import CENTER
from twa_scale.kernels.numba.compiled import NumbaKernels
from twa_scale.kernels.packed_rows import BLOCKS
from twa_scale.kernels.torch.reference import TorchKernels
from twa_scale.ranks import Group
from twa_scale.store import make_store

CPU = torch.device("cpu")
KERNELS: list[Kernels] = [TorchKernels(), NumbaKernels()]
BITS = [8, 4, 2, 1]
each_kernels = pytest.mark.parametrize("kernels", KERNELS, ids=lambda kernels: kernels.name)
each_bits = pytest.mark.parametrize("bits", BITS)


def walk(n: int, m: int, seed: int = 0) -> Tensor:
    """Return candidates of one run: a random walk."""
    torch.manual_seed(seed)
    return (torch.randn(1, m) + 0.1 * torch.randn(n, m).cumsum(0)).float()


def coded(values: Tensor, weights: list[float], bits: int, kernels: Kernels, coding: Coding, start: int = 0) -> Any:
    """Return the rounded candidates, (n, m), and their squared errors according to the kernels."""
    n, m = values.shape
    rows, center = Packed.empty(n, m, start, bits, CPU), torch.empty(m)
    errors = torch.zeros(n, dtype=torch.float64)
    kernels.make_deltas(values, weights, Target(rows, center, coding=coding, errors=errors), 0)
    return coding.products_of_deltas(packed_rows(rows).double()) + center, errors


class TestCoding:
    @pytest.mark.parametrize(
        ("center", "first"), [("mean", 2), ("last", 4), ("first", 0), (1, 1), ("ema:0.5", 3), ([2.0, -1, 0, 0, 0], 0)]
    )
    def test_increments_start_at_the_center(self, center: Any, first: int) -> None:
        coding = of_increments(center_weights(center, 5))
        assert coding.before[first] == CENTER
        assert all(coding.before[i] == i + (1 if i < first else -1) for i in range(5) if i != first)
        assert coding.levels[0] == (first,)
        assert sorted(i for level in coding.levels for i in level) == list(range(5))

    @given(st.lists(st.floats(-1, 1), min_size=1, max_size=9), st.integers(0, 99))
    def test_row_weights_and_products_are_adjoint(self, b: list[float], seed: int) -> None:
        """<sum_i u_i delta_i, g> is the same from rows and from deltas, also for several groups."""
        torch.manual_seed(seed)
        n = len(b)
        rows, g, u = torch.randn(n, 7).double(), torch.randn(7).double(), torch.randn(n, 3).double()
        for coding in (of_increments(b), of_deltas(n)):
            deltas = torch.zeros(n, 7).double()
            for i in (i for level in coding.levels for i in level):
                deltas[i] = rows[i] + (deltas[coding.before[i]] if coding.before[i] != CENTER else 0)
            torch.testing.assert_close(coding.products_of_deltas(rows @ g), deltas @ g)
            torch.testing.assert_close(coding.weights_of_rows(u).T @ rows, u.T @ deltas)


@each_kernels
@each_bits
class TestErrors:
    def test_errors_equal_those_of_the_kernels(self, kernels: Kernels, bits: int) -> None:
        """Rows have full and partial tiles, and start and end inside a block."""
        values, weights = walk(7, 9001), [1 / 7] * 7
        for coding in (of_increments(weights), of_deltas(7)):
            kept, errors = coded(values, weights, bits, kernels, coding, start=37)
            torch.testing.assert_close((kept - values.double()).square().sum(1), errors, rtol=1e-4, atol=1e-7)

    def test_errors_do_not_accumulate(self, kernels: Kernels, bits: int) -> None:
        """The error of increments does not grow along a trajectory, as that of deltas does."""
        n = 24
        values, weights = walk(n, 4096), [1 / n] * n
        _, errors = coded(values, weights, bits, kernels, of_increments(weights))
        _, around = coded(values, weights, bits, kernels, of_deltas(n))
        ends = [0, 1, n - 2, n - 1]
        assert errors[ends].max() < 1.5 * errors.median()
        assert errors.sum() < 0.6 * around.sum(), (errors, around)

    def test_equal_candidates_are_exact(self, kernels: Kernels, bits: int) -> None:
        values = walk(1, 3000).expand(5, -1).contiguous()
        kept, errors = coded(values, [0.2] * 5, bits, kernels, of_increments([0.2] * 5), start=5)
        assert torch.equal(kept, values.double()) and not errors.any()


@each_bits
@settings(max_examples=15)
@given(m=st.integers(1, 3000), start=st.integers(0, 500), n=st.integers(2, 5), seed=st.integers(0, 99))
def test_kernels_agree(bits: int, m: int, start: int, n: int, seed: int) -> None:
    """Rounding of ties depends on the order of sums, and affects the following rows."""
    values, weights = walk(n, m, seed), [1 / n] * n
    first, second = (coded(values, weights, bits, kernels, of_increments(weights), start)[0] for kernels in KERNELS)
    scale = 0.1 * n**0.5 * 5
    assert ((first - second).abs() <= scale * 2.1 / (1 << bits)).all()
    assert (first != second).sum() <= (3 + 1e-4 * first.numel()) * n * BLOCKS[bits]


@each_bits
@each_kernels
@settings(max_examples=10)
@given(data=st.data(), m=st.integers(0, 1500), start=st.integers(0, 700))
def test_rows_do_not_depend_on_chunks_and_splits(
    kernels: Kernels, bits: int, data: st.DataObject, m: int, start: int
) -> None:
    """Rows are bitwise equal for any chunks and shards that do not split a block."""
    values, coding = walk(3, m), of_increments([0.2, 0.3, 0.5])
    borders = range(128 - start % 128, m, 128)
    indices = sorted(set(data.draw(st.lists(st.sampled_from(borders), max_size=4)))) if borders else []

    def held(parts: list[tuple[int, int]]) -> Tensor:
        actual = []
        for low, high in parts:
            rows = Packed.empty(3, high - low, start + low, bits, CPU)
            kernels.make_deltas(values[:, low:high].clone(), [0.2, 0.3, 0.5], Target(rows, coding=coding), 0)
            actual.append(packed_rows(rows))
        return torch.cat([torch.empty(3, 0), *actual], 1)

    whole = held([(0, m)])
    assert torch.equal(held(list(zip([0, *indices], [*indices, m], strict=True))), whole)
    rows = Packed.empty(3, m, start, bits, CPU)
    for low, high in zip([0, *indices], [*indices, m], strict=True):
        kernels.make_deltas(values[:, low:high].clone(), [0.2, 0.3, 0.5], Target(rows, coding=coding), low)
    assert torch.equal(packed_rows(rows), whole)


class TestChoice:
    def choose(self, values: Tensor, **settings: Any) -> bool:
        """Return whether increments are chosen."""
        states = [{"a": row[:100], "b": row[100:].view(2, -1)} for row in values]
        config, n = validated(TwaConfig, {"store": "packed2"} | settings), len(values)
        candidates = open_candidates(states)
        coding = choose_coding(config, center_weights(config.center, n), Group.alone(), CPU, candidates, ["a", "b"])
        assert not any(candidate.bytes_read for candidate in candidates)
        return not coding.relative_to_center

    def test_increments_for_a_run_and_deltas_for_a_soup(self) -> None:
        run = walk(9, 5000)
        soup = torch.randn(1, 5000) + 0.1 * torch.randn(9, 5000)
        assert self.choose(run) and not self.choose(soup)
        assert not self.choose(run[torch.tensor([8, 3, 0, 6, 1, 7, 4, 2, 5])])
        assert self.choose(soup, coding="increments") and not self.choose(run, coding="center")

    def test_only_packed_stores_hold_increments(self) -> None:
        assert not self.choose(walk(9, 5000), store="dense16")
        with pytest.raises(ConfigError, match="coding 'increments' is for packed stores; the store is 'dense32'"):
            validated(TwaConfig, {"coding": "increments"})

    def test_values_that_are_not_finite(self) -> None:
        values = walk(9, 5000)
        values[4, 77] = torch.nan
        assert not self.choose(values)


def model() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(20, 64), nn.Tanh(), nn.Linear(64, 3))


def states(n: int) -> list[dict[str, Tensor]]:
    base = model().state_dict()
    rows = {name: 0.05 * walk(n, value.numel(), i) for i, (name, value) in enumerate(base.items())}
    return [{name: value + rows[name][i].view_as(value) for name, value in base.items()} for i in range(n)]


class TestAttached:
    def test_live_weights_are_those_of_the_rounded_candidates(self, tmp_path: Path) -> None:
        """The center is exact, and the reported rounding errors are correct."""
        given_ = states(6)
        for i, state in enumerate(given_):
            save_file(state, tmp_path / f"{i}.safetensors")
        net = model()
        twa = twa_scale.attach(net, str(tmp_path / "*.safetensors"), {"store": "packed1", "coding": "increments"})
        exact = torch.stack([torch.cat([v.flatten() for v in state.values()]) for state in given_]).double()

        def flat() -> Tensor:
            return torch.cat([p.detach().flatten() for p in net.parameters()]).double()

        torch.testing.assert_close(flat(), exact.mean(0), rtol=1e-6, atol=1e-6)
        assert twa.rounding is not None
        for i, error in enumerate(twa.rounding.errors):
            with twa.weights(i):
                off = (flat() - exact[i]).norm() / (exact[i] - exact.mean(0)).norm()
            assert off == pytest.approx(error, rel=0.01)
        assert "packed1, coding increments" in str(twa.rounding)
        twa.close()

    def test_state_is_loaded_with_another_coding(self) -> None:
        """Coefficients refer to candidates and do not depend on the coding."""
        given_ = states(6)
        settings_ = {"store": "packed8", "groups": "tensor", "optimizer": {"name": "sgd", "lr": 0.3}}
        ended = []
        for codings in (["center"] * 2, ["center", "increments"], ["increments", "center"], ["increments"] * 2):
            state = None
            for coding in codings:
                net = model()
                twa = twa_scale.attach(net, given_, settings_ | {"coding": coding})
                if state is not None:
                    twa.load_state_dict(state)
                for seed in range(3):
                    x = torch.randn(16, 20, generator=torch.Generator().manual_seed(seed))
                    net(x).square().mean().backward()
                    twa.step()
                state = twa.state_dict()
                twa.close()
            assert state is not None
            ended.append(state["coefficients"])
        for other in ended[1:]:
            torch.testing.assert_close(other, ended[0], rtol=1e-3, atol=1e-3)
        assert (ended[0] - 1 / 6).abs().max() > 0.01


def test_256_candidates_of_a_run() -> None:
    """A store with 1-bit increments holds them, and their basis is orthonormal up to rounding."""
    n = 256
    given_ = states(n)
    twa = twa_scale.attach(model(), given_, {"store": "packed1", "basis": "orthonormal"})
    assert twa.rounding is not None and twa.rounding.coding == "increments"
    assert sum(twa.rounding.errors) / n < 0.2
    torch.testing.assert_close(twa.coefficients, torch.full((n, 1), 1 / n).double(), rtol=0, atol=1e-4)
    twa.close()
    deltas = walk(n, 2000).double()
    rows = torch.cat([deltas - deltas.mean(0), deltas.mean(0, keepdim=True)])
    basis = Orthonormal((rows @ rows.T)[None], torch.full((n,), 1 / n).double())
    matrix = basis.matrix[0]
    assert matrix.shape == (n + 1, n)
    torch.testing.assert_close(matrix.T @ basis.gram[0] @ matrix, torch.eye(n).double(), rtol=0, atol=1e-9)


def test_store_has_its_coding() -> None:
    coding = of_increments([0.5, 0.5])
    store = make_store(TwaConfig(store="packed4"), 2, CPU, lambda _: [], coding)
    assert store.coding is coding and store.reserve(Span("w", 0, 10)).coding is coding
    assert make_store(TwaConfig(store="mapped"), 2, CPU, lambda _: []).coding.relative_to_center
