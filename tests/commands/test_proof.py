"""`make proof` at the smallest size: every method runs on real data, and nothing runs twice."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from examples.proof.adapters.task import Adapters
from examples.proof.detection.task import Detection
from examples.proof.images.task import Images
from examples.proof.language.task import Language
from examples.proof.language.texts import write_texts
from examples.proof.parts import run_parts
from examples.proof.run import Comparison, check
from examples.proof.soup.task import Soup
from examples.proof.table import tables
from examples.proof.vit.task import Vit
from examples.training import Training
from twa_scale.ranks import World

ROOT = Path(__file__).resolve().parents[2]
SENTENCES = ROOT / ".venv/share/vaderSentiment-3.3.2.tar.gz"
PACKAGES = ROOT / "runs/proof/packages"
ONCE: dict[str, tuple[Any, Path]] = {
    "language": (Language, PACKAGES),
    "images": (Images, PACKAGES),
    "vit": (Vit, PACKAGES),
    "detection": (Detection, PACKAGES),
    "soup": (Soup, SENTENCES),
    "adapters": (Adapters, SENTENCES),
}


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Return the directory of a command that ran all tasks in one process, and its output."""
    assert SENTENCES.exists(), "the sentences are missing: `make test-slow` fetches them"
    assert any(PACKAGES.glob("dataset-fashion-mnist_*.deb")), "the images are missing: `make test-slow` fetches them"
    out = tmp_path_factory.mktemp("proof")
    command = [sys.executable, "-m", "examples.proof.run", "--task", *ONCE, "--size=tiny", "--seeds=0"]
    command += [f"--out={out}", f"--sentences={SENTENCES}", f"--packages={PACKAGES}"]
    return out, subprocess.run(command, check=True, cwd=ROOT, capture_output=True, text=True).stdout


@pytest.mark.slow
@pytest.mark.xdist_group("proof")
@pytest.mark.parametrize("task", ONCE)
def test_every_method_runs_once_and_has_a_row_in_the_table(task: str, ran: tuple[Path, str]) -> None:
    out, result = ran
    kind, source = ONCE[task]
    settings = kind.read("tiny")
    written = tables(out / f"{task}-tiny", settings)
    assert written in result
    for name, method in settings["methods"].items():
        row = rf"^\| {re.escape(name)} \| (\d+) \| (\d+) \| [\d.]+ % \|.* [\d.]+ \|"
        actual = re.search(row, written, re.MULTILINE)
        assert actual, name
        if method["how"] in ("anneal", "decayed", "schedule") and "start" not in method:
            assert int(actual[1]) == method["steps"] and int(actual[2]) == settings.get("recalibrate_batches", 0), name
        if method["how"] == "longer":
            assert int(actual[1]) == method["steps"], name
    work = kind(out / f"{task}-tiny", 0, settings, source)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.json")}
    run_parts(work.parts(), work.rows)
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*.json")} == before
    assert not list((out / f"{task}-tiny").glob("seed-0/runs/*/average"))


@pytest.mark.slow
@pytest.mark.parametrize("sentences", [None, Path("none.tar.gz")])
def test_missing_sentences_are_found_before_the_work(sentences: Path | None, tmp_path: Path) -> None:
    settings = Soup.read("tiny")
    comparisons = [Comparison("soup", Soup, tmp_path / "soup", settings, sentences, settings["seeds"])]
    with pytest.raises(SystemExit, match=r"--sentences: .* is missing: `make proof` downloads it"):
        check(comparisons, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_development_seeds_of_soups_are_judged_by_validation_sentences_that_no_method_uses(tmp_path: Path) -> None:
    files = {seed: Soup(tmp_path, seed, Soup.read("tiny"), SENTENCES).files for seed in (0, 100)}
    assert files[0]["test"] == tmp_path / "data/test.csv"
    assert files[100] == {**files[0], "test": tmp_path / "halves/judged-by.csv"}
    used = {path.read_text().splitlines()[1] for path in files[0].values()}
    assert len(used) == 3 and files[100]["test"].read_text().splitlines()[1] not in used


class Interrupted(Training):
    """A training that stops before its ninth step."""

    def update(self, step: int, factor: float) -> float:
        if step == 8:
            raise KeyboardInterrupt
        return super().update(step, factor)


@pytest.mark.slow
def test_a_trunk_that_was_interrupted_has_the_same_candidates(tmp_path: Path) -> None:
    whole, work = (Language(tmp_path / name, 0, Language.read("tiny"), tmp_path) for name in ("whole", "interrupted"))
    whole.trunk.run(whole.training)
    write_texts(tmp_path / "interrupted/texts", ["python"], work.settings["pieces"], tmp_path)
    settings = work.settings["trunk"]
    arguments = work.config(), World.from_environment(), settings["steps"], settings["lr"]
    with pytest.raises(KeyboardInterrupt):
        work.trunk.run(Interrupted(*arguments))
    assert work.trunk.run(work.training)["steps"] == whole.settings["trunk"]["steps"]
    for name in ("candidates/step-00000012/model.safetensors", "candidates/step-00000006/model.safetensors"):
        assert (work.trunk.directory / name).read_bytes() == (whole.trunk.directory / name).read_bytes()
    states = [torch.load(w.trunk.state(12), weights_only=True)["optimizer"]["state"][0] for w in (whole, work)]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
