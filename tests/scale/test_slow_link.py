"""Pods are not limited by a link that limits DDP: two network namespaces, 100 Mbit/s, 20 ms, 22 M parameters."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

PROGRAM = Path(__file__).resolve().parents[2] / "examples" / "pods" / "run.py"
ROUND_TRIP = 2 * 0.020  # seconds


def namespaces() -> str:
    return subprocess.run(["ip", "netns", "list"], check=True, capture_output=True, text=True).stdout


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Return the results of examples/pods with few steps."""
    before = namespaces()
    out = tmp_path_factory.mktemp("slow-link") / "results.json"
    subprocess.run([sys.executable, str(PROGRAM), "--steps=3", f"--json={out}"], check=True)
    assert namespaces() == before, "a namespace was left behind"
    actual: dict[str, Any] = json.loads(out.read_text())
    return actual


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="network namespaces need root")
class TestSlowLink:
    def test_weights_are_those_of_one_process_on_all_batches(self, results: dict[str, Any]) -> None:
        assert results["parameters"] >= 20e6 and results["moved"] > 1e-3
        assert all(run["error"] <= 1e-5 for run in results["runs"])

    def test_counted_bytes_equal_the_expected_bytes(self, results: dict[str, Any]) -> None:
        """Pods send gradients of coefficients and a few headers. DDP sends gradients and half of the weights."""
        for run in results["runs"]:
            for key in ("sent", "received"):
                if run["mode"] == "pods":
                    assert results["coefficient_bytes"] <= run[key] < results["coefficient_bytes"] + 5_000
                else:
                    assert 0.95 < run[key] / (6 * results["parameters"]) < 1.1

    def test_pods_are_limited_by_latency_and_ddp_by_bandwidth(self, results: dict[str, Any]) -> None:
        fastest = {(run["mode"], run["slow"]): run["fastest"] for run in results["runs"]}
        noise = 0.5 * fastest["pods", False]  # of the cores, which other processes use, too
        assert fastest["pods", True] < fastest["pods", False] + 6 * ROUND_TRIP + noise
        predicted = 8 * 6 * results["parameters"] / (results["link"]["megabits"] * 1e6)
        assert fastest["ddp", True] >= 0.8 * predicted
        assert fastest["ddp", True] > 5 * fastest["pods", True]


FAILS = """
from link import two_hosts
with two_hosts() as hosts:
    raise KeyError("in between")
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="network namespaces need root")
def test_hosts_are_removed_after_an_error() -> None:
    before = namespaces()
    environment = {**os.environ, "PYTHONPATH": str(PROGRAM.parent)}
    ended = subprocess.run([sys.executable, "-c", FAILS], env=environment, capture_output=True, text=True)
    assert "in between" in ended.stderr, ended.stderr
    assert namespaces() == before
