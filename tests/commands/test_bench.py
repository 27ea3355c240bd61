"""Tests of `twa-scale bench`."""

import json
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from typer.testing import CliRunner

from tests.commands.conftest import TrainedCandidates
from tests.commands.small_runs import settings
from tests.pool import Pool
from twa_scale import ConfigError
from twa_scale.cli import app
from twa_scale.config import RunConfig, validated
from twa_scale.ranks import World
from twa_scale.tools.bench import bench_json, bench_table, planned, timing
from twa_scale.tools.bench.files import run_streaming
from twa_scale.tools.bench.stores import bench_bytes, run_bench
from twa_scale.tools.planning import make_plan

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def few_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measure each operation once."""
    monkeypatch.setattr(timing, "_MIN_CALLS", 1)
    monkeypatch.setattr(timing, "_MIN_SECONDS", 0.0)


def test_json_counts_every_byte() -> None:
    threads = torch.get_num_threads()
    n, m = 3, 20_000
    names = "dense32,dense16,packed4"
    arguments = ["bench", "--json", "--elements", str(m), "--candidates", str(n), "--stores", names, "--threads", "1"]
    try:
        result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    finally:
        torch.set_num_threads(threads)
    actual = json.loads(result.output)
    assert actual["threads"] == 1 and actual["elements"] == m
    deltas = {"dense32": 4 * n * m, "dense16": 2 * n * m}
    for name, size in deltas.items():
        parts = {row["name"]: row for row in actual["stores"][name]}
        assert parts["project"]["nbytes"] == size + 4 * m
        assert parts["combine"]["nbytes"] == size + 8 * m
        assert parts["update"]["nbytes"] == parts["project"]["nbytes"] + parts["combine"]["nbytes"]
    for row in [*actual["memory"], *actual["others"], *actual["stores"]["packed4"]]:
        assert row["seconds"] > 0 and row["rate"] == pytest.approx(row["nbytes"] / row["seconds"])
    assert {"AdamW(fused=True)", "published project", "published combine"} <= {row["name"] for row in actual["others"]}


def test_table_has_a_row_for_each_operation() -> None:
    actual = run_bench(["packed1"], 1001, 2, None, "torch", CPU)
    assert bench_table(actual).row_count == 2 + 3 + 4 + 2
    by_row = run_bench(["packed1"], 1001, 2, None, "torch", CPU, row_length=100)
    assert [row.name for row in by_row.stores["packed1"][3:]] == ["project, rows of 100", "combine, rows of 100"]


@pytest.mark.parametrize(("store", "kernels"), [("packed3", "auto"), ("packed4", "fortran"), ("mapped", "auto")])
def test_stores_that_cannot_be_measured_are_refused(store: str, kernels: str) -> None:
    with pytest.raises(ConfigError, match=r"bench"):
        run_bench([store], 100, 2, None, kernels, CPU)  # type: ignore[list-item]


def test_streaming_counts_the_bytes_of_the_files(tmp_path: Path) -> None:
    n, m = 3, 30_000
    names = ["packed4", "dense32", "mapped"]
    actual = {row.name: row for row in run_streaming(names, m, n, "auto", CPU, tmp_path)}
    for label in ("plain read", *(f"attach, {name}" for name in names)):
        assert 2 * n * m < actual[label].nbytes < 2 * n * m + n * 500 and actual[label].seconds > 0
    for label in ("copy", "copy and sync", "export and sync"):
        assert 2 * n * m < actual[label].nbytes < 2 * n * m + n * 500
    for label in ("read all, copy one and sync", "merge and sync"):
        assert 2 * (n + 1) * m < actual[label].nbytes < 2 * (n + 1) * m + (n + 1) * 500
    assert not list(tmp_path.iterdir())
    small = run_bench(["packed1"], 1001, 2, None, "torch", CPU)
    assert bench_table(small, list(actual.values())).row_count == 2 + 3 + 4 + 2 + 9
    assert len(json.loads(bench_json(small, list(actual.values())))["streaming"]) == 9


def measure_on_a_rank() -> int:
    """Measure on two ranks with different numbers of calls."""
    with patch.multiple(timing, _MIN_CALLS=2 + 3 * dist.get_rank(), _MIN_SECONDS=0.0):
        return run_bench(["packed4"], 1000, 2, None, "torch", CPU).elements


@pytest.mark.slow
def test_all_ranks_make_equally_many_calls(ranks: Pool) -> None:
    assert ranks(measure_on_a_rank, 2) == [1000, 1000]


@pytest.fixture
def config(text: TrainedCandidates, tmp_path: Path) -> Path:
    """Return the configuration of a run."""
    path = tmp_path / "run.json"
    path.write_text(json.dumps(settings(text.candidates, text.task, tmp_path / "out", store="packed8")))
    return path


def found(*words: object) -> dict[str, Any]:
    result = CliRunner().invoke(app, ["bench", *map(str, words), "--json"], catch_exceptions=False)
    return json.loads(result.output)  # type: ignore[no-any-return]


def seconds(rows: list[dict[str, Any]]) -> dict[str, float]:
    return {row["name"]: row["seconds"] for row in rows}


def test_estimated_step_of_a_configuration(config: Path, tmp_path: Path) -> None:
    result = found(config, "groups=tensor", "--ranks", 2, "--streaming", tmp_path)
    plan = make_plan(validated(RunConfig, json.loads(config.read_text())), 2)
    assert plan.num_groups > 1
    run, n = result["run"], plan.num_candidates
    assert run["elements"] == run["measured"] == result["elements"] == plan.local_elements < plan.trained_elements
    assert result["candidates"] == n and list(result["stores"]) == list(run["stores"]) == ["packed8"]
    step, measured = seconds(run["stores"]["packed8"]), seconds(result["stores"]["packed8"])
    assert step["project"] == measured["project"] and step["combine"] == measured["combine"]
    parts = ("project", "reduction over 1 ranks", "coefficient step", "combine")
    assert step["step"] == pytest.approx(sum(step[part] for part in parts))
    rates = {row["name"]: row["rate"] for row in result["streaming"]}
    assert step["attach"] == pytest.approx(plan.bytes_read / rates["attach, packed8"])
    nbytes = {row["name"]: row["nbytes"] for row in run["stores"]["packed8"]}
    assert nbytes["reduction over 1 ranks"] == 8 * (n + 1) * plan.num_groups
    # The measured tensors are the same, so the blocks of every tensor count, also partial ones.
    for row in result["stores"]["packed8"][:2]:
        assert nbytes[row["name"]] == row["nbytes"]


def test_fewer_elements_are_scaled_up(config: Path) -> None:
    plan = make_plan(validated(RunConfig, json.loads(config.read_text())), 1)
    output = found(config, "--elements", 1000, "--stores", "dense32,dense16")
    assert (output["elements"], output["run"]["measured"], output["run"]["elements"]) == (
        1000,
        1000,
        plan.local_elements,
    )
    for store, bytes_of_delta in (("dense32", 4), ("dense16", 2)):
        step, measured = seconds(output["run"]["stores"][store]), seconds(output["stores"][store])
        assert step["project"] == pytest.approx(measured["project"] * plan.local_elements / 1000)
        assert step["coefficient step"] == output["coefficients"]["seconds"]
        project, *_, combine, _ = output["run"]["stores"][store]
        assert project["nbytes"] == (bytes_of_delta * plan.num_candidates + 4) * plan.local_elements
        assert combine["nbytes"] == (bytes_of_delta * plan.num_candidates + 8) * plan.local_elements
    result = CliRunner().invoke(app, ["bench", str(config), "--elements", "1000"], catch_exceptions=False)
    assert "scaled up from 1,000" in " ".join(result.output.split())


@pytest.mark.parametrize("size", [1, 3])
def test_measurement_uses_at_most_half_of_the_free_memory(
    config: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    loaded = validated(RunConfig, json.loads(config.read_text()) | {"device": "cpu"})
    plan = make_plan(loaded, 1)
    needs = bench_bytes(["packed8"], plan.local_elements, plan.num_candidates)
    for free, all_of_it in ((2 * size * needs, True), (2 * size * needs - 2 * size, False)):
        monkeypatch.setattr(planned, "free_memory", lambda free=free: free)
        work = planned.planned_work(plan, loaded, [], None, World(0, size, 0))
        assert (work.elements == plan.local_elements) == all_of_it
        assert 0 < bench_bytes(["packed8"], work.elements, plan.num_candidates) <= free / size / 2


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["CONFIG", "--candidates", "3"], "--candidates"),
        (["CONFIG", "--kernels", "torch"], "--kernels"),
        (["CONFIG", "--cuda"], "--cuda"),
        (["--ranks", "2"], "--ranks"),
        (["CONFIG", "--stores", "packed3"], "packed3"),
        (["CONFIG", "store=mapped"], "mapped"),
        (["CONFIG", "stroe=packed4"], "store"),
    ],
)
def test_options_that_contradict_the_configuration_are_refused(config: Path, words: list[str], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        CliRunner().invoke(
            app, ["bench", *(str(config) if w == "CONFIG" else w for w in words)], catch_exceptions=False
        )
