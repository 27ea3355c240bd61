"""Merges equal a dense float64 sum, are exact where candidates are equal, and refuse invalid values."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from tests.pool import Pool
from tests.sums import averaged
from twa_scale.base.notices import TwaWarning
from twa_scale.candidates import open_candidates
from twa_scale.candidates.carry_over import CarriedFiles
from twa_scale.errors import CandidateError, OutputError, StateError
from twa_scale.kernels.torch.checksum import checksum
from twa_scale.merge import Checksums, Combination, average_fixed, merge
from twa_scale.merge import streamed as merging
from twa_scale.output.options import OutputOptions
from twa_scale.ranks import Group

Tensors = dict[str, torch.Tensor]
A = [0.7, -0.4, 0.5]  # with the sum 0.8, so that no code relies on the sum 1


def tensors(seed: int) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    return {
        "big": torch.randn(37, 11, generator=generator),
        "half": torch.randn(50, generator=generator).bfloat16(),
        "wide": torch.randn(5, generator=generator, dtype=torch.float64),
        "bias": torch.randn(3, generator=generator),
        "scalar": torch.randn((), generator=generator),
        "steps": torch.tensor(seed),
        "flags": torch.tensor([seed == 2, True]),
    }


def save(root: Path, states: Sequence[Tensors]) -> str:
    for i, state in enumerate(states):
        (root / f"step-{i}").mkdir(parents=True)
        save_file(state, root / f"step-{i}/model.safetensors")
    return str(root / "step-*")


def by_name(name: str) -> Sequence[float] | int:
    return 1 if name == "bias" else A


def work(pattern: str, out: Path, chunk: int, **options: Any) -> tuple[Checksums, list[int]]:
    before, merging._CHUNK = merging._CHUNK, chunk
    candidates = open_candidates(pattern)
    try:
        checksums = merge(candidates, out, Combination(by_name), Group.world(), **options)
    finally:
        merging._CHUNK = before
    return checksums, [candidate.bytes_read for candidate in candidates]


def expected(states: Sequence[Tensors]) -> Tensors:
    return averaged(A, states) | {"bias": states[1]["bias"], "steps": states[-1]["steps"], "flags": states[-1]["flags"]}


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("chunk", [16, 1 << 21])
def test_equals_the_dense_sum_on_any_number_of_ranks(ranks: Pool, tmp_path: Path, size: int, chunk: int) -> None:
    states = [tensors(i) for i in range(3)]
    results = ranks(
        work,
        size,
        pattern=save(tmp_path, states),
        out=tmp_path / "out",
        chunk=chunk,
        output=OutputOptions(max_shard_size=900),
    )
    actual: Tensors = {}
    for file in (tmp_path / "out").glob("*.safetensors"):
        actual |= load_file(file)
    for name, value in expected(states).items():
        assert actual[name].dtype == states[-1][name].dtype and actual[name].shape == states[-1][name].shape
        tolerance = {torch.bfloat16: 1e-2, torch.float32: 1e-6, torch.float64: 1e-14}.get(actual[name].dtype, 0)
        torch.testing.assert_close(actual[name].double(), value.double(), rtol=tolerance, atol=tolerance)

    floats = ["big", "half", "wide", "scalar"]
    copied = ["bias", "steps", "flags"]  # of all candidates, to compare them
    total = [sum(result[1][i] for result in results) for i in range(3)]
    for i, state in enumerate(states):
        read = floats + copied
        assert total[i] == sum(state[name].nbytes for name in read)  # one rank reads each byte once
        for checksums, _ in results:
            assert checksums[i] == {name: checksum(state[name].reshape(-1)) for name in read}
    if size > 1 and chunk == 16:
        shares = [sum(result[1]) for result in results]
        assert max(shares) < 1.3 * sum(shares) / size


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30)
@given(data=st.data())
def test_equal_elements_keep_their_bits(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]))
    n = data.draw(st.integers(2, 9))
    kind = data.draw(st.sampled_from(["uniform", "ema", "one"]))
    a = {"uniform": [1 / n] * n, "ema": [0.9**i for i in range(n)], "one": [float(i == 1) for i in range(n)]}[kind]
    a = [value / sum(a) for value in a]
    state = {"w": torch.randn(100).to(dtype) * 7}
    states = [state] * n if kind != "one" else [{"w": state["w"] + i} for i in range(n)]
    out = tmp_path_factory.mktemp("merge") / "out"
    merge(open_candidates(states), out, Combination(lambda _: a), Group.alone())
    assert torch.equal(load_file(out / "model.safetensors")["w"], states[1]["w"])


def test_candidates_of_weight_zero_are_not_read(tmp_path: Path) -> None:
    candidates = open_candidates([{"w": torch.ones(4)}, {"w": torch.full((4,), torch.nan)}])
    checksums = merge(candidates, tmp_path / "out", Combination(lambda _: [1.0, 0.0]), Group.alone())
    assert candidates[1].bytes_read == 0 and list(checksums[0]) == ["w"] and checksums[1] == {}


def test_types_and_replacements(tmp_path: Path) -> None:
    states = [tensors(i) for i in range(3)]
    messages: list[tuple[int, int]] = []
    merge(
        open_candidates(states),
        tmp_path / "out",
        Combination(by_name, values={"scalar": torch.tensor(9.0), "steps": torch.tensor(7)}),
        Group.alone(),
        output=OutputOptions(dtype=torch.float16),
        carried=CarriedFiles(files={"config.json": b"{}"}),
        progress=lambda nbytes, total: messages.append((nbytes, total)),
    )
    actual = load_file(tmp_path / "out/model.safetensors")
    assert {n for n, t in actual.items() if t.dtype == torch.float16} == {"big", "half", "wide", "bias", "scalar"}
    assert actual["scalar"] == 9 and actual["steps"] == 7 and actual["flags"].dtype == torch.bool
    assert (tmp_path / "out/config.json").read_bytes() == b"{}"
    read = sum(s[n].nbytes for s in states for n in ("big", "half", "wide", "bias", "flags"))
    assert sum(nbytes for nbytes, _ in messages) == read and {total for _, total in messages} == {read}


# What must not be published


def set_fault(root: Path, value: float, tensor: str = "big") -> str:
    states = [tensors(i) for i in range(3)]
    states[1][tensor].view(-1)[-1] = value
    return save(root, states)


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_values_that_are_not_finite(ranks: Pool, tmp_path: Path, size: int, value: float) -> None:
    error = ranks.error(work, size, pattern=set_fault(tmp_path, value), out=tmp_path / "out", chunk=16)
    assert isinstance(error, CandidateError)
    assert all(part in str(error) for part in ("step-1", "'big'", "element 406"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-0", "step-1", "step-2"]


def test_copied_values_may_be_infinite_but_not_nan(tmp_path: Path) -> None:
    work(set_fault(tmp_path / "inf", float("-inf"), "bias"), tmp_path / "out", 16)
    assert load_file(tmp_path / "out/model.safetensors")["bias"][-1] == float("-inf")
    with pytest.raises(CandidateError, match=r"'bias' holds nan at element .* Leave this candidate out"):
        work(set_fault(tmp_path / "nan", float("nan"), "bias"), tmp_path / "out2", 16)


def test_copy_of_a_candidate_is_reported(tmp_path: Path) -> None:
    for i, value in enumerate((1.0, 2.0, 2.0, 2.0, 2.0)):
        (tmp_path / f"step-{i}").mkdir()
        save_file({"w": torch.full((3,), value)}, tmp_path / f"step-{i}/model.safetensors")
    with pytest.warns(TwaWarning, match=r"step-1, .*step-2 and 2 more have the same checksum in every") as caught:
        average_fixed([f"{tmp_path}/step-*"], tmp_path / "out")
    assert len(caught) == 1


@pytest.mark.filterwarnings("error")
def test_candidates_of_weight_zero_are_not_compared(tmp_path: Path) -> None:
    for i in range(3):
        (tmp_path / f"step-{i}").mkdir()
        # The integers of all candidates are read.
        stored = {"w": torch.full((3,), float(i)), "position_ids": torch.arange(4)}
        save_file(stored, tmp_path / f"step-{i}/model.safetensors")
    average_fixed([f"{tmp_path}/step-*"], tmp_path / "out", weights="last")


def refuse(checksums: Checksums) -> None:
    raise StateError("step-1: tensor 'big' is not what it was")


def work_refused(pattern: str, out: Path) -> None:
    work(pattern, out, 16, verify=refuse)


@pytest.mark.parametrize("size", [1, 2])
def test_verification_comes_before_publishing(ranks: Pool, tmp_path: Path, size: int) -> None:
    pattern = save(tmp_path, [tensors(i) for i in range(3)])
    assert isinstance(ranks.error(work_refused, size, pattern=pattern, out=tmp_path / "out"), StateError)
    assert not (tmp_path / "out").exists()


def test_result_that_overflows_the_dtype(tmp_path: Path) -> None:
    candidates = open_candidates([{"w": torch.full((2,), 70000.0)}] * 2)
    with pytest.raises(OutputError, match=r"'w'.*70000.*65504"):
        options = OutputOptions(dtype=torch.float16)
        merge(candidates, tmp_path / "out", Combination(lambda _: [0.5, 0.5]), Group.alone(), output=options)
    assert list(tmp_path.iterdir()) == []


def test_replacements_must_fit(tmp_path: Path) -> None:
    candidates = open_candidates([tensors(0), tensors(1)])
    for name, message in (("bias", r"\(4,\)"), ("bais", "did you mean 'bias'")):
        with pytest.raises(CandidateError, match=message):
            merge(candidates, tmp_path / "out", Combination(lambda _: 0, values={name: torch.ones(4)}), Group.alone())


def test_output_must_not_be_a_candidate(tmp_path: Path) -> None:
    pattern = save(tmp_path, [tensors(i) for i in range(3)])
    for out in (tmp_path / "step-2", tmp_path):
        with pytest.raises(OutputError, match="holds the candidate"):
            work(pattern, out, 16, output=OutputOptions(overwrite=True))
    assert len(list(tmp_path.iterdir())) == 3
