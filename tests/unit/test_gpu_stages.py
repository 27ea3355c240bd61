"""The GPU stages start and end without a GPU, and run with small data on a CPU."""

import json
import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import launches
from tests.gpu.stages import __main__
from tests.gpu.stages.__main__ import SKIPPED, STAGES
from tests.gpu.stages.overlap import intersection, length, merged, overlap_text
from tests.simulated import CUDA, Simulated, simulated
from twa_scale.kernels import Packed
from twa_scale.kernels.triton import fused
from twa_scale.store.projection import products

ROOT = Path(__file__).parents[2]
WITHOUT_GPU = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}


def results(out: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads((out / "results.json").read_text())
    return rows


@pytest.mark.slow
def test_gpu_script_runs_stages_and_prints_the_table(tmp_path: Path) -> None:
    """Each stage is a separate process. The table is printed at the end."""
    environment = {**WITHOUT_GPU, "OUT": str(tmp_path), "PYTHON": sys.executable}
    command = ["bash", "tests/gpu/run.sh", "kernels"]
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert [(row["stage"], row["name"]) for row in results(tmp_path)] == [("kernels", SKIPPED)]
    assert (tmp_path / "table.md").read_text() in ended.stdout
    assert {path.name for path in tmp_path.iterdir()} == {"results.json", "table.md", "log.txt"}


def run_here(monkeypatch: pytest.MonkeyPatch, out: Path, *arguments: str) -> tuple[int, list[dict[str, Any]]]:
    monkeypatch.setattr(sys, "argv", ["", "--out", str(out), *arguments])
    status = __main__.main()
    __main__.write_table(out)
    return status, results(out)


def test_every_stage_is_skipped_without_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    status, actual = run_here(monkeypatch, tmp_path)
    assert status == 0 and [(row["stage"], row["name"]) for row in actual] == [(name, SKIPPED) for name in STAGES]
    assert f"| waits | {SKIPPED} |" in (tmp_path / "table.md").read_text()


def test_a_stage_that_fails_stops_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(STAGES, "kernels", (1, "machine.is_not_there"))
    status, actual = run_here(monkeypatch, tmp_path, "--tiny", "--device", "cpu", "kernels", "machine")
    assert status == 1 and [row["stage"] for row in actual] == ["kernels", "machine", "machine"]
    assert actual[0]["ok"] is False and "AttributeError" in actual[0]["measured"]


@pytest.mark.slow
def test_all_stages_on_small_data(tmp_path: Path) -> None:
    """All stages run in one process. All results are as expected, except for what a CPU cannot do."""
    command = [sys.executable, "-m", "tests.gpu.stages", "--tiny", "--device", "cpu", "--out", str(tmp_path)]
    ended = subprocess.run(command, cwd=ROOT, env=WITHOUT_GPU, capture_output=True, text=True, timeout=600)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    __main__.write_table(tmp_path)  # in a separate process, as in the script
    actual = results(tmp_path)
    assert {row["stage"] for row in actual} == set(STAGES)
    assert {row["stage"] for row in actual if row["ok"] is False} <= {"update"}


def test_overlap_of_streams() -> None:
    first = merged([(5, 9), (0, 2), (1, 3), (9, 10)])
    assert first == [(0, 3), (5, 10)] and length(first) == 8
    assert intersection(first, [(2, 6)]) == [(2, 3), (5, 6)]
    text = overlap_text({7: [(0, 4000), (6000, 10_000)], 9: [(3000, 5000)]})
    assert text == "the model's stream ran 8.00 ms and paused 2.00; others ran 2.00 ms, 50% of it during the model"
    assert overlap_text({}) == "no kernels in the trace"


class Launched:
    """A replacement for a Triton kernel."""

    def __init__(self) -> None:
        self.times = 0

    def __getitem__(self, grid: object) -> "Launched":
        return self

    def __call__(self, *args: object, **options: object) -> None:
        self.times += 1


@pytest.mark.parametrize(("start", "elements"), [(0, 4096), (0, 5000), (37, 5000), (37, 20), (0, 1)])
def test_counted_launches_equal_real_launches(monkeypatch: pytest.MonkeyPatch, start: int, elements: int) -> None:
    kernels = {name: Launched() for name in ("_project_packed", "_combine_packed")}
    for name, kernel in kernels.items():
        monkeypatch.setattr(fused, name, kernel)
    monkeypatch.setattr(torch.cuda, "device_of", lambda _: nullcontext())
    with simulated() as device:
        rows = Packed.empty(launches.CANDIDATES, elements, start, launches.BITS, CUDA)
        gradient, out = _vector(device, elements), _vector(device, elements)
        weights, sums = _vector(device, launches.CANDIDATES), _vector(device, launches.CANDIDATES + 1).double()
        triton = fused.TritonKernels()
        device.launches.clear()
        sums += products(triton, rows, None, gradient)
        project = kernels["_project_packed"].times + sum(device.launches.values())
        device.launches.clear()
        triton.combine(rows, weights, gradient, 1.0, out)
        combine = kernels["_combine_packed"].times + sum(device.launches.values())
    assert launches.count([(start, elements)]) == (project, combine)


def _vector(device: Simulated, elements: int) -> torch.Tensor:
    return device.on_device(torch.ones(elements))


def test_spans_of_all_ranks_tile_the_70b_model() -> None:
    total = sum(torch.Size(shape).numel() for shape in launches.LLAMA_70B)
    for engine in launches.ENGINES:
        owned = [launches.spans(engine, rank) for rank in range(launches.RANKS)]
        assert sum(size for spans in owned for _, size in spans) == total, engine


def test_docs_have_the_stages_and_the_launches() -> None:
    page = (ROOT / "docs/gpu.md").read_text()
    assert "\n".join(launches.table()) in page
    assert [line.split("`")[1] for line in page.splitlines() if line.startswith("| `")] == list(STAGES)
