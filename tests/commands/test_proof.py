"""`make proof-small` at the smallest size: every method runs, on Python's own sources, and nothing is run twice."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from examples.proof.language.task import Language, read_settings
from examples.proof.language.texts import write_texts
from examples.training import Training
from twa_scale.ranks import World

ROOT = Path(__file__).resolve().parents[2]


def proof(out: Path) -> str:
    command = [sys.executable, "-m", "examples.proof.run", "--size=tiny", "--seeds", "0", f"--out={out}"]
    return subprocess.run(command, check=True, cwd=ROOT, capture_output=True, text=True).stdout


@pytest.mark.slow
def test_every_method_runs_once_and_has_a_row_in_the_table(tmp_path: Path) -> None:
    first = proof(tmp_path)
    settings = read_settings("tiny")
    for name, method in settings["methods"].items():
        found = re.search(rf"^\| {re.escape(name)} \| (\d+) \| (\d+) \| [\d.]+ % \| [\d.]+ \|", first, re.MULTILINE)
        assert found, name
        if method["how"] in ("anneal", "decayed") and "start" not in method:
            assert int(found[1]) == method["steps"] and int(found[2]) == 0, name
    rows = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.json")}
    again = proof(tmp_path)
    assert again == first[first.index("Finished seeds") :]
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.json")} == rows


class Interrupted(Training):
    """A training that ends before its ninth step."""

    def update(self, step: int, factor: float) -> float:
        if step == 8:
            raise KeyboardInterrupt
        return super().update(step, factor)


@pytest.mark.slow
def test_a_trunk_that_was_interrupted_has_the_same_candidates(tmp_path: Path) -> None:
    whole, work = (Language(tmp_path / name, 0, "tiny", tmp_path) for name in ("whole", "interrupted"))
    whole.make_trunk()
    write_texts(tmp_path / "interrupted/texts", ["python"], work.settings["pieces"], tmp_path)
    settings = work.settings["trunk"]
    arguments = work.config(), World.from_environment(), settings["steps"], settings["lr"]
    with pytest.raises(KeyboardInterrupt):
        work.trunk.run(Interrupted(*arguments))
    assert work.make_trunk()["steps"] == whole.settings["trunk"]["steps"]
    for name in ("candidates/step-00000012/model.safetensors", "candidates/step-00000006/model.safetensors"):
        assert (work.trunk.directory / name).read_bytes() == (whole.trunk.directory / name).read_bytes()
    states = [torch.load(w.trunk.state(12), weights_only=True)["optimizer"]["state"][0] for w in (whole, work)]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
