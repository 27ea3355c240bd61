"""`twa-scale bench` measures what it says, on one process."""

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from twa_scale import ConfigError
from twa_scale.bench import run_bench
from twa_scale.cli import app
from twa_scale.filebench import run_streaming
from twa_scale.tables import bench_json, bench_table

CPU = torch.device("cpu")


def test_json_counts_every_byte() -> None:
    threads = torch.get_num_threads()
    n, m = 3, 20_000
    names = "dense32,dense16,packed4"
    arguments = ["bench", "--json", "--elements", str(m), "--candidates", str(n), "--stores", names, "--threads", "1"]
    try:
        result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    finally:
        torch.set_num_threads(threads)
    found = json.loads(result.output)
    assert found["threads"] == 1 and found["elements"] == m
    deltas = {"dense32": 4 * n * m, "dense16": 2 * n * m}
    for name, size in deltas.items():
        parts = {row["what"]: row for row in found["stores"][name]}
        assert parts["project"]["nbytes"] == size + 4 * m
        assert parts["combine"]["nbytes"] == size + 8 * m
        assert parts["update"]["nbytes"] == parts["project"]["nbytes"] + parts["combine"]["nbytes"]
    for row in [*found["memory"], *found["others"], *found["stores"]["packed4"]]:
        assert row["seconds"] > 0 and row["rate"] == pytest.approx(row["nbytes"] / row["seconds"])
    assert {"AdamW(fused=True)", "published project", "published combine"} <= {row["what"] for row in found["others"]}


def test_a_table() -> None:
    found = run_bench(["packed1"], 1001, 2, None, "torch", CPU)
    assert bench_table(found).row_count == 2 + 3 + 4 + 2


@pytest.mark.parametrize(("store", "kernels"), [("packed3", "auto"), ("packed4", "fortran"), ("mapped", "auto")])
def test_what_cannot_be_measured_is_refused(store: str, kernels: str) -> None:
    with pytest.raises(ConfigError, match=r"bench"):
        run_bench([store], 100, 2, None, kernels, CPU)


def test_streaming_counts_the_bytes_of_the_files(tmp_path: Path) -> None:
    n, m = 3, 30_000
    names = ["packed4", "dense32", "mapped"]
    found = {row.what: row for row in run_streaming(names, m, n, "auto", CPU, tmp_path)}
    for what in ("plain read", *(f"attach, {name}" for name in names)):
        assert 2 * n * m < found[what].nbytes < 2 * n * m + n * 500 and found[what].seconds > 0
    for what in ("copy and sync", "export and sync"):
        assert 2 * m < found[what].nbytes < 2 * m + 500
    assert not list(tmp_path.iterdir())
    small = run_bench(["packed1"], 1001, 2, None, "torch", CPU)
    assert bench_table(small, list(found.values())).row_count == 2 + 3 + 4 + 2 + 6
    assert len(json.loads(bench_json(small, list(found.values())))["streaming"]) == 6
