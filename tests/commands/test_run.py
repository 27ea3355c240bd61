"""`run` writes complete outputs, and exports the weights that it trained."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file
from torch import nn

from tests.commands import small_runs
from tests.commands.conftest import TrainedCandidates
from tests.commands.small_runs import by_hand, load, run_here, settings, state_of
from tests.grid import rest_slow
from tests.pool import Pool
from twa_scale.config import RunConfig, TaskConfig, load_config, validated
from twa_scale.output import temporary
from twa_scale.ranks import World
from twa_scale.run.loop import Run
from twa_scale.run.progress import Report
from twa_scale.run.tasks import build_task, stack

FILES = [
    "average", "coefficients.png", "config.json", "metrics.jsonl", "state.previous.pt", "state.pt", "summary.json",
    "tensorboard",
]  # fmt: skip


def lines(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def finished_run(text: TrainedCandidates, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the output of a completed run, which tests must not change."""
    output = tmp_path_factory.mktemp("run") / "out"
    (output / ".average.tmp-0a1b2c3d").mkdir(parents=True)  # from a killed run
    with (output / ".average.tmp-0a1b2c3d.lock").open("wb") as lock:
        lock.write(temporary._host(lock.fileno()))
    run_here(settings(text.candidates, text.task, output, steps=6, evaluate_every=2), pictures=True)
    return output


def test_all_outputs_exist(finished_run: Path) -> None:
    assert sorted(path.name for path in finished_run.iterdir()) == FILES
    assert sorted(path.name for path in (finished_run / "average").iterdir()) == [
        "README.md", "config.json", "model.safetensors", "tokenizer.json", "twa_scale.json",
    ]  # fmt: skip
    assert (finished_run / "coefficients.png").read_bytes().startswith(b"\x89PNG")
    assert any(path.name.startswith("events") for path in (finished_run / "tensorboard").iterdir())
    assert (finished_run / "state.pt").stat().st_size < 100_000  # kilobytes


def test_metrics_have_every_step_once(finished_run: Path) -> None:
    steps = [line["step"] for line in lines(finished_run) if "loss" in line]
    evaluations = [line["step"] for line in lines(finished_run) if "validation/loss" in line]
    assert steps == [1, 2, 3, 4, 5, 6] and evaluations == [0, 2, 4, 6]
    rates = [line["lr"] for line in lines(finished_run) if "lr" in line]
    assert rates[0] == max(rates) and 0 < rates[-1] == min(rates)
    bits = [line["validation/bits_per_byte"] for line in lines(finished_run) if "validation/loss" in line]
    assert bits[-1] == pytest.approx(lines(finished_run)[-1]["validation/loss"] / 0.6931471805599453)


def test_the_configuration_is_written_with_its_defaults(finished_run: Path) -> None:
    config = RunConfig.model_validate_json((finished_run / "config.json").read_text())
    assert config.steps == 6 and config.basis == "normalized" and config.optimizer.lr == 0.1


def test_the_summary_counts_what_was_read(finished_run: Path, text: TrainedCandidates) -> None:
    summary = json.loads((finished_run / "summary.json").read_text())
    candidates = [load(path) for path in Path(text.candidates).parent.glob("step-*")]
    assert summary["bytes_read_per_rank"] == [sum(value.nbytes for state in candidates for value in state.values())]
    elements = sum(value.numel() for value in candidates[0].values())
    assert summary["store_bytes_per_rank"] == [4 * (small_runs.N + 1) * elements]
    assert summary["steps"] == 6 and summary["ranks"] == 1 and summary["evaluation"]["validation/loss"] > 0
    assert summary["forward_backward_seconds"] > 0 and summary["cost"]["project"]["seconds"] > 0


def test_export_equals_the_weighted_sum(finished_run: Path, text: TrainedCandidates) -> None:
    exported, expected = load(finished_run / "average"), by_hand(text.candidates, finished_run)
    assert exported.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(exported[name].double(), value, rtol=1e-6, atol=1e-7)
    assert (
        state_of(finished_run)["twa"]["coefficients"] - 1 / small_runs.N
    ).abs().max() > 0.02  # the directory has moved


def test_export_has_the_metrics_of_the_run(finished_run: Path, text: TrainedCandidates) -> None:
    task = build_task(validated(TaskConfig, text.task))
    model, data = task.model(), task.dataset("validation")
    model.load_state_dict(load(finished_run / "average"))
    total, count = task.metrics(model.eval(), stack([data[i] for i in range(24)]))["loss"]
    summary = json.loads((finished_run / "summary.json").read_text())
    assert total.item() / count == pytest.approx(summary["evaluation"]["validation/loss"], rel=1e-5)


def test_the_report_has_the_numbers_of_the_run(finished_run: Path, tmp_path: Path, shell: Any) -> None:
    result = shell("report", finished_run, "-o", tmp_path / "page.html")
    assert result.code == 0, result.err
    page, summary = (tmp_path / "page.html").read_text(), json.loads((finished_run / "summary.json").read_text())
    for metrics in summary["comparison"].values():
        assert all(f">{value:.6g}<" in page for value in metrics.values())
    assert "finished" in page and "Mean coefficient by step" in page and "by kind and depth" in page
    assert load_config(finished_run / "config.json", ["output=again"]).steps == 6  # the command in the message


def test_the_coefficients_are_recorded(finished_run: Path) -> None:
    last = state_of(finished_run)["twa"]["coefficients"]
    actual = [line for line in lines(finished_run) if "coefficients/0" in line]
    assert [line["step"] for line in actual if "loss" in line] == [1, 2, 3, 4, 5, 6]
    assert [line["step"] for line in actual if "distance" in line] == [0, 2, 4, 6]
    assert actual[0]["distance"] == 0 and actual[0]["effective_candidates"] == pytest.approx(small_runs.N)
    for i in range(small_runs.N):
        assert float(last[i].min()) <= actual[-1][f"coefficients/{i}"] <= float(last[i].max())
    summary = json.loads((finished_run / "summary.json").read_text())
    step = summary["exported_step"]
    assert summary["distance"] == pytest.approx(next(x["distance"] for x in actual[::-1] if x["step"] == step))


@pytest.mark.parametrize("shards", ["5GB", "40kB"])
def test_the_command_export_writes_the_same(finished_run: Path, tmp_path: Path, shell: Any, shards: str) -> None:
    result = shell("export", finished_run, "--out", tmp_path / "merged", "--max-shard-size", shards)
    assert result.code == 0 and "exact merge of 3 candidates" in result.out and "step 6" in result.out
    live, merged = load(finished_run / "average"), load(tmp_path / "merged")
    assert live.keys() == merged.keys()
    for name, value in live.items():
        assert float((merged[name] - value).norm()) <= 1e-6 * float(value.norm())
    assert ((tmp_path / "merged/model.safetensors.index.json").exists()) == (shards != "5GB")
    assert (tmp_path / "merged/tokenizer.json").exists()


def test_the_live_weights_are_exported_bit_for_bit(text: TrainedCandidates, tmp_path: Path) -> None:
    config = validated(RunConfig, settings(text.candidates, text.task, tmp_path / "out", max_shard_size="40kB"))
    trained = Run(config, World(0, 1, 0), torch.device("cpu"), Report(active=False))
    trained.train()
    exported = load(tmp_path / "out/average")
    assert len(list((tmp_path / "out/average").glob("*.safetensors"))) > 1
    assert all(torch.equal(exported[name], value) for name, value in trained.model.state_dict().items())


def test_training_lowers_the_loss_that_it_is_trained_on(scores: TrainedCandidates, tmp_path: Path) -> None:
    """The loss decreases on full batches of a custom task, that is, on the objective itself."""
    changes = {"steps": 30, "batch_size": 60, "split": "validation", "evaluate_batches": None, "evaluate_every": 10}
    run_here(settings(scores.candidates, scores.task, tmp_path / "out", **changes))
    losses = [line["validation/loss"] for line in lines(tmp_path / "out") if "validation/loss" in line]
    assert losses[-1] < 0.98 * losses[0] and losses[-1] < losses[1] + 1e-6


def test_epochs_are_counted_in_whole_batches(scores: TrainedCandidates, tmp_path: Path) -> None:
    changes = {"steps": None, "epochs": 2.5, "batch_size": 20}  # 60 examples
    assert run_here(settings(scores.candidates, scores.task, tmp_path / "out", **changes))["steps"] == 8


@pytest.mark.parametrize("engine", ["plain", pytest.param("ddp", marks=pytest.mark.slow), "fsdp2"])
def test_batchnorm_statistics_are_measured_and_exported(
    ranks: Pool, digits: TrainedCandidates, tmp_path: Path, shell: Any, engine: str
) -> None:
    output = tmp_path / "out"
    changes = {"engine": engine, "batch_size": 24, "evaluate_batches": None, "recalibrate_batches": 20}
    ranks(run_here, 1 if engine == "plain" else 2, data=settings(digits.candidates, digits.task, output, **changes))
    exported = load(output / "average")
    assert shell("export", output, "--out", tmp_path / "merged").code == 0
    merged = load(tmp_path / "merged")
    for name, value in exported.items():
        torch.testing.assert_close(merged[name], value, rtol=1e-5, atol=1e-6)

    task = build_task(validated(TaskConfig, digits.task))
    model, data = task.model(), task.dataset("train")
    assert isinstance(model, nn.Sequential)
    model.load_state_dict(exported)
    with (
        torch.no_grad()
    ):  # 20 batches of 24 are the whole split, so the mean of the first layer does not depend on the order
        images = stack([data[i] for i in range(len(data))])["images"].float() / 255
        mean = model[0](images).mean((0, 2, 3))
        var = model[3](model[:3].eval()(images)).var((0, 2, 3))
    torch.testing.assert_close(exported["1.running_mean"], mean, rtol=1e-4, atol=1e-5)
    assert ((exported["4.running_var"] - var) / var).abs().max() < 0.15  # unequal batches: close, but not equal
    last = load(sorted(Path(digits.candidates).parent.glob("step-*"))[-1])
    assert (exported["1.running_mean"] - last["1.running_mean"]).abs().max() > 1e-3

    held_out = task.dataset("validation")
    metrics = task.metrics(model.eval(), stack([held_out[i] for i in range(len(held_out))]))
    summary = json.loads((output / "summary.json").read_text())["evaluation"]
    for name, (total, count) in metrics.items():
        assert total.item() / count == pytest.approx(summary[f"validation/{name}"], rel=1e-4)


def test_candidates_without_a_count_of_batches(digits: TrainedCandidates, tmp_path: Path, shell: Any) -> None:
    """Old files do not have a count. Exports of their average do not have one either."""
    for path in Path(digits.candidates).parent.glob("step-*"):
        (tmp_path / path.name).mkdir()
        state = {name: value for name, value in load(path).items() if "num_batches" not in name}
        save_file(state, tmp_path / path.name / "model.safetensors")
    run_here(settings(str(tmp_path / "step-*"), digits.task, tmp_path / "out"))
    assert shell("export", tmp_path / "out", "--out", tmp_path / "merged").code == 0
    live, merged = load(tmp_path / "out/average"), load(tmp_path / "merged")
    assert live.keys() == merged.keys() and torch.equal(live["1.running_var"], merged["1.running_var"])


# The same run with other engines and ranks


@pytest.fixture(scope="module")
def single_rank(text: TrainedCandidates, tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    output = tmp_path_factory.mktemp("alone")
    run_here(settings(text.candidates, text.task, output))
    return load(output / "average")


@pytest.mark.parametrize(
    ("engine", "size", "micro"),
    rest_slow(
        [
            ("plain", 1, 3),
            ("plain", 1, 1),
            ("plain", 2, None),
            ("ddp", 2, None),
            ("ddp", 2, 2),
            ("fsdp2", 2, None),
            ("fsdp2", 2, 3),
            ("auto", 3, 2),
        ],
        lambda engine, size, micro: engine == "auto" or (engine, micro) in (("plain", 3), ("ddp", 2), ("fsdp2", 3)),
    ),
)
def test_engines_ranks_and_micro_batches_make_no_difference(
    ranks: Pool,
    single_rank: dict[str, torch.Tensor],
    text: TrainedCandidates,
    tmp_path: Path,
    engine: str,
    size: int,
    micro: int | None,
) -> None:
    data = settings(text.candidates, text.task, tmp_path, engine=engine, micro_batch_size=micro)
    summaries = ranks(run_here, size, data=data)
    assert len({json.dumps(summary["evaluation"]) for summary in summaries}) == 1
    if engine != "plain":
        total = sum(value.nbytes for value in single_rank.values())
        assert sum(summaries[0]["bytes_read_per_rank"]) == small_runs.N * total
    exported = load(tmp_path / "average")
    for name, value in single_rank.items():
        assert float((exported[name] - value).norm()) <= 2e-6 * float(value.norm()), name


@pytest.mark.parametrize("engine", ["plain", "fsdp2"])
def test_bfloat16_computation_is_close_to_float32(
    ranks: Pool, single_rank: dict[str, torch.Tensor], text: TrainedCandidates, tmp_path: Path, engine: str
) -> None:
    data = settings(text.candidates, text.task, tmp_path, engine=engine, precision="bfloat16")
    ranks(run_here, 1 if engine == "plain" else 2, data=data)
    exported = load(tmp_path / "average")
    for name, value in single_rank.items():
        assert exported[name].dtype == torch.float32
        assert float((exported[name] - value).norm()) <= 2e-2 * float(value.norm()), name


@pytest.mark.parametrize("basis", ["orthonormal", "pca", "simplex"])
@pytest.mark.parametrize("store", ["dense32", "dense16"])
def test_exports_equal_the_coefficients_of_every_basis_and_store(
    scores: TrainedCandidates, tmp_path: Path, basis: str, store: str
) -> None:
    run_here(settings(scores.candidates, scores.task, tmp_path, basis=basis, store=store, groups=["^0", "bias"]))
    exported = load(tmp_path / "average")
    for name, value in by_hand(scores.candidates, tmp_path).items():
        error = float((exported[name].double() - value).norm() / value.norm())
        assert error <= (1e-6 if store == "dense32" else 1e-3), name


def test_fixed_tensors_stay_at_the_center(scores: TrainedCandidates, tmp_path: Path, shell: Any) -> None:
    run_here(settings(scores.candidates, scores.task, tmp_path / "out", exclude=["bias"], center="last"))
    last = load(sorted(Path(scores.candidates).parent.glob("step-*"))[-1])
    assert shell("export", tmp_path / "out", "--out", tmp_path / "merged").code == 0
    for location in (tmp_path / "out/average", tmp_path / "merged"):
        actual = load(location)
        assert all(torch.equal(actual[name], last[name]) == ("bias" in name) for name in last)


def test_run_with_overrides(scores: TrainedCandidates, tmp_path: Path, shell: Any) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(settings(scores.candidates, scores.task, tmp_path / "out")))
    result = shell("run", config, "steps=2", "optimizer.lr=3e-3", "groups=block")
    assert result.code == 0, result.err
    written = json.loads((tmp_path / "out/config.json").read_text())
    assert (written["steps"], written["optimizer"]["lr"], written["groups"]) == (2, 0.003, "block")
    assert result.out == "" and "one step of rank 0" in result.err.lower() and "coefficients.png" in result.err
