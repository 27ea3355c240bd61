"""`average`, `inspect` and `plan` compared with numpy and with the run."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

from tests.commands import small_runs
from tests.commands.conftest import TrainedCandidates
from tests.commands.small_runs import load, run_here, settings
from tests.pool import Pool
from tests.sums import averaged
from twa_scale import ConfigError
from twa_scale.merge import average_fixed


def states(candidates: str) -> list[dict[str, torch.Tensor]]:
    pattern = Path(candidates)
    return [load(path) for path in sorted(pattern.parent.glob(pattern.name))]


def step_paths(trained_candidates: TrainedCandidates) -> list[Path]:
    return sorted(Path(trained_candidates.candidates).parent.glob("step-*"))


def expected(candidates: str, weights: list[float]) -> dict[str, torch.Tensor]:
    actual = states(candidates)
    kept = {name: value for name, value in actual[-1].items() if not value.is_floating_point()}
    return averaged(weights, actual) | kept


def check(out: Path, candidates: str, weights: list[float], rtol: float = 1e-6) -> None:
    wanted, actual = expected(candidates, weights), load(out)
    assert actual.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(actual[name].double(), value.double(), rtol=rtol, atol=rtol * 0.1)


@pytest.mark.parametrize(
    ("name", "weights"),
    [
        ("uniform", [1 / 3] * 3),
        ("linear", [1 / 3] * 3),
        ("ema:0.5", [1 / 7, 2 / 7, 4 / 7]),
        ("ema-torch:0.5", [1 / 4, 1 / 4, 1 / 2]),
        ("-2", [0, 1, 0]),
        ("0.7, -0.2,0.5", [0.7, -0.2, 0.5]),
        ("minus-sqrt", [(1 / 3) ** 0.5, (2 / 3) ** 0.5 - (1 / 3) ** 0.5, 1 - (2 / 3) ** 0.5]),
        ("first", [1, 0, 0]),
        ("last", [0, 0, 1]),
    ],
)
def test_named_weights(digits: TrainedCandidates, tmp_path: Path, shell: Any, name: str, weights: list[float]) -> None:
    result = shell("average", digits.candidates, "--weights", name, "--out", tmp_path / "out")
    assert result.code == 0, result.err
    check(tmp_path / "out", digits.candidates, weights)
    messages = [float(line.split()[0]) for line in result.out.splitlines()[:3]]
    assert messages == pytest.approx(weights, abs=1e-6) and "average of 3 candidates" in result.out


def test_explicit_weights(digits: TrainedCandidates, tmp_path: Path, shell: Any) -> None:
    paths = sorted(Path(digits.candidates).parent.glob("step-*"))
    words = [f"{path}:{weight}" for path, weight in zip(paths, ["0.7", "-.2", "5e-1"], strict=True)]
    result = shell("average", *words, "--out", tmp_path / "out")
    assert result.code == 0, result.err
    check(tmp_path / "out", digits.candidates, [0.7, -0.2, 0.5])


def test_weights_of_another_sum_than_one(digits: TrainedCandidates, tmp_path: Path, shell: Any) -> None:
    words = [f"{path}:{weight}" for path, weight in zip(step_paths(digits), ["1", " 3", "4 "], strict=True)]
    result = shell("average", *words, "--out", tmp_path / "out")
    assert (
        result.code == 2 and "sum 8" in result.err and "--normalize" in result.err and not (tmp_path / "out").exists()
    )
    assert shell("average", *words, "--normalize", "--out", tmp_path / "out").code == 0
    check(tmp_path / "out", digits.candidates, [1 / 8, 3 / 8, 1 / 2])
    with pytest.raises(
        ConfigError, match=r"nan is not a finite number; give one finite weight for each candidate: nan,"
    ):
        average_fixed([words[0].partition(":")[0] + ":nan", *words[1:]], tmp_path / "out")
    with pytest.raises(ConfigError, match=r"normalize=True"):
        average_fixed(words, tmp_path / "out2")
    average_fixed(words, tmp_path / "out2", normalize=True)
    check(tmp_path / "out2", digits.candidates, [1 / 8, 3 / 8, 1 / 2])


@pytest.mark.parametrize(
    ("weights", "options", "message"),
    [
        (["1", "-1", "0"], ["--normalize"], "sum 0"),
        (["-1", "-2", "-3"], ["--normalize"], "positive"),
        (["nan", "1", "0"], [], "finite"),
        (["inf", "1", "0"], ["--normalize"], "finite"),
        (["1/3", "1/3", "1/3"], [], "'1/3' is not a number"),
        (["0.5", "0.5", "0"], ["--weights", "uniform"], "one or the other"),
        (None, ["--weights", "0.5,0.5"], "2 weights for 3 candidates"),
        (None, ["--weights", "1 2 3"], "--normalize"),
        (None, ["--weights", "ema:1"], "0 < DECAY < 1"),
        (None, ["--weights", "medain"], "'medain'"),
        (None, ["--weights", "3"], "no candidate 3"),
    ],
)
def test_weights_that_are_refused(
    digits: TrainedCandidates, tmp_path: Path, shell: Any, weights: list[str] | None, options: list[str], message: str
) -> None:
    paths = step_paths(digits)
    words = paths if weights is None else [f"{path}:{weight}" for path, weight in zip(paths, weights, strict=True)]
    answer = shell("average", *words, *options, "--out", tmp_path / "out")
    assert answer.code == 2 and message in answer.err and not (tmp_path / "out").exists()


def test_colon_in_a_file_name_is_not_a_weight(digits: TrainedCandidates, tmp_path: Path, shell: Any) -> None:
    for name, path in zip(("a:1", "b:2"), sorted(Path(digits.candidates).parent.glob("step-*")), strict=False):
        (tmp_path / name).symlink_to(path)
    result = shell("average", tmp_path / "a:1", tmp_path / "b:2", "--out", tmp_path / "out")
    assert result.code == 0, result.err
    result = shell("average", f"{tmp_path / 'a:1'}:1", f"{tmp_path / 'b:2'}:0", "--out", tmp_path / "out2")
    assert result.code == 0, result.err


def test_type_shards_and_overwriting(text: TrainedCandidates, tmp_path: Path, shell: Any) -> None:
    words = ("average", text.candidates, "--out", tmp_path / "out", "--dtype", "bfloat16", "--max-shard-size", "20kB")
    assert shell(*words).code == 0
    check(tmp_path / "out", text.candidates, [1 / 3] * 3, rtol=1e-2)
    assert all(value.dtype == torch.bfloat16 for value in load(tmp_path / "out").values())
    assert (tmp_path / "out/model.safetensors.index.json").exists() and (tmp_path / "out/tokenizer.json").exists()
    for file in (tmp_path / "out").glob("*.safetensors"):
        assert file.stat().st_size < 20_000 or len(load_file(file)) == 1
    result = shell(*words)
    assert result.code == 2 and "not empty" in result.err
    assert shell("average", text.candidates, "--out", tmp_path / "out", "--overwrite").code == 0
    assert [path.name for path in (tmp_path / "out").glob("*.safetensors")] == ["model.safetensors"]
    check(tmp_path / "out", text.candidates, [1 / 3] * 3)


def test_average_of_one_candidate_equals_it(text: TrainedCandidates, tmp_path: Path, shell: Any) -> None:
    path = sorted(Path(text.candidates).parent.glob("step-*"))[0]
    assert shell("average", path, "--out", tmp_path / "out").code == 0
    actual = load(tmp_path / "out")
    assert all(torch.equal(actual[name], value) for name, value in load(path).items())


def average_on_ranks(candidates: str, out: Path) -> None:
    average_fixed([candidates], out, "ema:0.5", max_shard_size="20kB")


def test_several_ranks_share_the_work(ranks: Pool, text: TrainedCandidates, tmp_path: Path) -> None:
    ranks(average_on_ranks, 3, candidates=text.candidates, out=tmp_path / "out")
    check(tmp_path / "out", text.candidates, [1 / 7, 2 / 7, 4 / 7])


# inspect


def test_inspect_matches_numpy(digits: TrainedCandidates, tmp_path: Path, shell: Any) -> None:
    result = shell("inspect", digits.candidates, "--json", "--plot", tmp_path / "cosines.png")
    assert result.code == 0, result.err
    actual = json.loads(result.out)
    rows = [
        np.concatenate([v.double().numpy().ravel() for _, v in sorted(s.items()) if v.is_floating_point()])
        for s in states(digits.candidates)
    ]
    flat = np.stack(rows)
    deltas = flat - flat.mean(0)
    lengths = np.linalg.norm(deltas, axis=1)
    np.testing.assert_allclose(actual["norms"], np.linalg.norm(flat, axis=1), rtol=1e-5)
    np.testing.assert_allclose(actual["delta_norms"], lengths, rtol=1e-5)
    np.testing.assert_allclose(actual["cosines"], deltas @ deltas.T / np.outer(lengths, lengths), atol=1e-5)
    np.testing.assert_allclose(actual["distances"], np.linalg.norm(flat[:, None] - flat[None], axis=2), atol=1e-4)
    state = states(digits.candidates)[0]
    assert actual["tensors"] == [len(state)] * 3
    assert actual["elements"] == [sum(value.numel() for value in state.values())] * 3
    assert actual["dtypes"] == ["float32, int64"] * 3
    assert (tmp_path / "cosines.png").read_bytes().startswith(b"\x89PNG")


def test_inspect_as_a_table(digits: TrainedCandidates, shell: Any) -> None:
    result = shell("inspect", digits.candidates)
    assert result.code == 0 and "reading" not in result.out
    for path in Path(digits.candidates).parent.glob("step-*"):
        assert path.name in result.out


def test_inspect_of_equal_candidates_and_of_one(digits: TrainedCandidates, shell: Any) -> None:
    path = sorted(Path(digits.candidates).parent.glob("step-*"))[0]
    for words in ([path, path], [path]):
        result = shell("inspect", *words, "--json")
        actual = json.loads(result.out)
        assert result.code == 0 and actual["delta_norms"] == [0] * len(words)
        assert all(cosine is None for row in actual["cosines"] for cosine in row)
        assert shell("inspect", *words).code == 0


# plan


@pytest.mark.parametrize(
    ("engine", "size"), [("plain", 1), ("fsdp2", 2), pytest.param("ddp", 2, marks=pytest.mark.slow)]
)
def test_plan_matches_the_run(
    ranks: Pool, text: TrainedCandidates, tmp_path: Path, shell: Any, engine: str, size: int
) -> None:
    config = tmp_path / "run.yaml"
    data = settings(text.candidates, text.task, tmp_path / "out", engine=engine, steps=1)
    config.write_text(yaml.safe_dump(data))
    result = shell("plan", config, "--ranks", size, "--json", "store=dense16")
    assert result.code == 0, result.err
    assert not (tmp_path / "out").exists()
    planned = json.loads(result.out)
    summary = ranks(run_here, size, data=data | {"store": "dense16"})[0]
    elements = sum(value.numel() for value in states(text.candidates)[0].values())
    assert (
        planned["num_candidates"] == 3
        and planned["num_groups"] == len(states(text.candidates)[0])
        and planned["trained_elements"] == elements
    )
    assert planned["memory"]["store (dense16)"] == pytest.approx(max(summary["store_bytes_per_rank"]), rel=0.01)
    assert planned["bytes_read"] == max(summary["bytes_read_per_rank"])
    assert planned["memory"]["weights"] == pytest.approx(4 * elements / (size if engine == "fsdp2" else 1), rel=0.01)
    moments = sum(planned[part][name] for part in ("attach",) for name in planned[part])
    assert planned["peak"] >= sum(planned["memory"].values()) + moments and planned["step"]["activations"] > 0
    assert (sum(planned["wire"].values()) > 0) == (size > 1)
    assert shell("plan", config, "--ranks", size).code == 0


@pytest.mark.parametrize(("engine", "size"), [("plain", 1), ("ddp", 2)])
def test_plan_counts_every_byte_that_is_read(ranks: Pool, tmp_path: Path, shell: Any, engine: str, size: int) -> None:
    """Buffers count for the rank that reads them for all ranks."""
    task = small_runs.digits(tmp_path / "digits.npz") | {"model": "tests.commands.small_runs:numbered_convnet"}
    candidates = small_runs.train_candidates(task, tmp_path / "candidates")
    data = settings(candidates, task, tmp_path / "out", engine=engine, steps=1)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(data))
    planned = json.loads(shell("plan", tmp_path / "run.yaml", "--ranks", size, "--json").out)
    assert planned["bytes_read"] == max(ranks(run_here, size, data=data)[0]["bytes_read_per_rank"])


def test_plan_scales_with_the_ranks(text: TrainedCandidates, tmp_path: Path, shell: Any) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(settings(text.candidates, text.task, tmp_path / "out", batch_size=64)))
    plans = [json.loads(shell("plan", config, "--ranks", ranks, "--json").out) for ranks in (1, 8, 64)]
    for key in ("weights", "store (dense32)"):
        sizes = [plan["memory"][key] for plan in plans]
        assert sizes[0] > 7 * sizes[1] and sizes == sorted(sizes, reverse=True)
    assert plans[1]["bytes_read"] < plans[0]["bytes_read"] / 7


def test_plan_of_batchnorm_and_of_a_custom_task(
    digits: TrainedCandidates, scores: TrainedCandidates, tmp_path: Path, shell: Any
) -> None:
    for trained_candidates in (digits, scores):
        config = tmp_path / "run.yaml"
        config.write_text(
            yaml.safe_dump(settings(trained_candidates.candidates, trained_candidates.task, tmp_path / "out"))
        )
        result = shell("plan", config, "--json")
        assert result.code == 0 and json.loads(result.out)["notes"] == []
