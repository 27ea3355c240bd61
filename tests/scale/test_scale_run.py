"""`make scale-run` with 0.1 G parameters: 16 candidates, 4 of them written, packed4 on two FSDP2 ranks, the check."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

PROGRAM = Path(__file__).resolve().parents[2] / "examples" / "scale" / "run.py"


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the files of a run of two steps."""
    scratch = tmp_path_factory.mktemp("scale-run")
    command = [sys.executable, str(PROGRAM), "--size=100m", "--written=4", "--steps=2", f"--scratch={scratch}"]
    subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    return scratch


@pytest.fixture(scope="module")
def results(scratch: Path) -> dict[str, Any]:
    actual: dict[str, Any] = json.loads((scratch / "100m" / "results.json").read_text())
    return actual


@pytest.mark.slow
class TestScaleRun:
    def test_memory_matches_plan(self, results: dict[str, Any]) -> None:
        """Within 10 %, including activations of the Hugging Face model and the packed store."""
        plan, summary = results["plan"], results["summary"]
        assert results["parameters"] >= 100e6 and not plan["notes"]
        assert summary["store_bytes_per_rank"] == [plan["memory"]["store (packed4)"]] * 2
        for peak in summary["peak_resident_bytes_per_rank"]:
            assert abs(peak - plan["peak"]) < 0.1 * plan["peak"], (peak, plan)

    def test_every_byte_is_read_once(self, results: dict[str, Any]) -> None:
        assert sum(results["summary"]["bytes_read_per_rank"]) == 16 * results["candidate_bytes"]
        assert results["candidate_bytes"] == 2 * results["parameters"]

    def test_export_equals_the_merge_within_4_bit_rounding(self, results: dict[str, Any]) -> None:
        actual = results["check"]
        assert actual["moved"] > 0.01  # otherwise the test would have no effect
        assert abs(actual["error"] / actual["predicted"] - 1) < 0.05
        assert actual["error"] < 0.2 and actual["cosine"] > 0.98
        low, high = actual["tensors"]
        assert low > 0.8 and high < 1.2  # also of norms with a thousand elements

    def test_the_exact_merge_is_rounded_once(self, results: dict[str, Any]) -> None:
        low, high = results["check"]["exact"]
        assert abs(low - 1) < 1e-4 and abs(high - 1) < 1e-4

    def test_no_large_files_remain(self, scratch: Path, results: dict[str, Any]) -> None:
        assert sum(path.stat().st_size for path in scratch.rglob("*") if path.is_file()) < 10e6
