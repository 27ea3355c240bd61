"""A run that receives a signal saves its state at the next boundary, and continues with the same result."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tests.commands.conftest import TrainedCandidates
from tests.commands.small_runs import load, run_here, settings, state_of
from tests.commands.test_resume import lines
from tests.grid import rest_slow
from tests.pool import Pool
from twa_scale.run.stopping import SIGNALS, STOPPED, Stop, Stopped

ROOT = Path(__file__).parents[2]
STEPS = 8


def life(
    trained_candidates: TrainedCandidates, output: Path, task: dict[str, Any] | None = None, **changes: Any
) -> dict[str, Any]:
    usual = {"steps": STEPS, "evaluate_every": 2, "checkpoint_every": 3}
    section = {"name": "tests.commands.interrupted:scores", **(task or {})}
    return settings(trained_candidates.candidates, section, output, **usual | changes)


def run_with_handlers(data: dict[str, Any]) -> str:
    """Return the messages of a run that is stopped, and the signal handlers of this process afterwards."""
    before = [signal.getsignal(number) for number in SIGNALS]
    with pytest.raises(Stopped) as stopped:
        run_here(data)
    assert [signal.getsignal(number) for number in SIGNALS] == before
    return str(stopped.value)


def same_end(one: Path, other: Path) -> None:
    for key in ("x", "coefficients"):
        assert torch.equal(state_of(one)["twa"][key], state_of(other)["twa"][key])
    expected, actual = load(one / "average"), load(other / "average")
    assert expected.keys() == actual.keys() and all(
        torch.equal(actual[name], value) for name, value in expected.items()
    )
    messages = [
        [{k: v for k, v in line.items() if k != "seconds"} for line in lines(output)] for output in (one, other)
    ]
    assert messages[0] == messages[1]


@pytest.fixture(scope="module")
def undisturbed(ranks: Pool, scores: TrainedCandidates, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("whole") / "out"
    ranks(run_here, 2, data=life(scores, output, engine="fsdp2"))
    return output


@pytest.mark.parametrize(
    ("method", "call", "rank", "step"),
    rest_slow(
        [
            ("dataset", 2, 1, 0),  # before the candidates are read
            ("model", 1, 0, 0),
            ("metrics", 1, 1, 0),  # during the evaluation of step 0
            ("metrics", 3, 0, 2),  # during the evaluation of step 2
            ("loss", 4, 1, 4),  # where an evaluation is due
            ("loss", 6, 0, 6),  # where the state is saved
            ("loss", STEPS, 1, STEPS),  # only the export remains
        ],
        lambda method, call, *_: method == "dataset" or (method, call) in (("metrics", 3), ("loss", 6)),
    ),
)
def test_all_ranks_stop_at_the_next_boundary(
    ranks: Pool,
    scores: TrainedCandidates,
    undisturbed: Path,
    tmp_path: Path,
    method: str,
    call: int,
    rank: int,
    step: int,
) -> None:
    task = {"method": method, "call": call, "rank": rank}
    result = ranks(run_with_handlers, 2, data=life(scores, tmp_path, task, engine="fsdp2"))
    assert result[0] == result[1] and f"at step {step} of {STEPS}" in result[0]
    assert state_of(tmp_path)["step"] == step and not (tmp_path / "average").exists()
    ranks(run_here, 2, data=life(scores, tmp_path, engine="fsdp2"))
    same_end(undisturbed, tmp_path)


def test_stopped_run_on_one_rank_continues(scores: TrainedCandidates, tmp_path: Path) -> None:
    run_here(life(scores, tmp_path / "whole"))
    run_with_handlers(life(scores, tmp_path / "parts", {"method": "loss", "call": 3}))
    run_here(life(scores, tmp_path / "parts"))
    same_end(tmp_path / "whole", tmp_path / "parts")


def test_signal_during_the_final_export_is_ignored(scores: TrainedCandidates, tmp_path: Path) -> None:
    evaluations = STEPS // 2 + 1  # of two batches each
    run_here(life(scores, tmp_path, {"method": "metrics", "call": 2 * evaluations}))
    assert (tmp_path / "average").exists()


def test_signal_handlers_are_restored_after_an_error() -> None:
    before = [signal.getsignal(number) for number in SIGNALS]
    stop = Stop()
    with pytest.raises(KeyError), stop.on_signals():
        assert all(signal.getsignal(number) != handler for number, handler in zip(SIGNALS, before, strict=True))
        signal.raise_signal(signal.SIGTERM)
        raise KeyError
    assert stop.asked and [signal.getsignal(number) for number in SIGNALS] == before


def test_signal_handlers_are_not_set_in_other_threads() -> None:
    seen: list[object] = []

    def inside() -> None:
        with Stop().on_signals():
            seen.extend(signal.getsignal(number) for number in SIGNALS)

    before = [signal.getsignal(number) for number in SIGNALS]
    thread = threading.Thread(target=inside)
    thread.start()
    thread.join()
    assert seen == before


def test_output_of_another_run_is_not_continued(scores: TrainedCandidates, tmp_path: Path) -> None:
    """A run with `resume: false` that is stopped before its first save leaves nothing to continue from."""
    run_here(life(scores, tmp_path, seed=1))
    with pytest.raises(RuntimeError, match="gone"):
        run_here(
            life(
                TrainedCandidates({}, scores.candidates),
                tmp_path,
                {"name": "tests.commands.small_runs:scores", "die_at": 1},
                resume=False,
            )
        )
    assert not (tmp_path / "state.pt").exists()


def test_exit_code_of_the_command(scores: TrainedCandidates, tmp_path: Path, shell: Any) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(life(scores, tmp_path / "out", {"method": "loss", "call": 2})))
    result = shell("run", config)
    assert result.code == STOPPED == 75
    assert f"stopped early at step 2 of {STEPS}" in result.err and "state.pt" in result.err
    assert shell("run", config, "task.method=none").code == 0
    assert [line["step"] for line in lines(tmp_path / "out") if "loss" in line] == list(range(1, STEPS + 1))


@pytest.mark.slow
@pytest.mark.parametrize("to", ["launcher", "rank"])
def test_under_torchrun(ranks: Pool, scores: TrainedCandidates, undisturbed: Path, tmp_path: Path, to: str) -> None:
    """torchrun passes SIGTERM to its ranks. One rank that receives a signal informs the others."""
    config = tmp_path / "run.yaml"
    data = life(scores, tmp_path / "out", engine="fsdp2")
    config.write_text(yaml.safe_dump(data))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["-m", "twa_scale", "run", str(config), "task.seconds=1.0"]
    with (tmp_path / "log").open("w") as log:
        launcher = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + 90
        while not lines_so_far(tmp_path / "out"):
            assert launcher.poll() is None and time.monotonic() < deadline, (tmp_path / "log").read_text()
            time.sleep(0.05)
        if to == "launcher":
            launcher.terminate()
        else:
            os.kill(max(children(launcher.pid)), signal.SIGUSR1)
        assert launcher.wait(60) == 1
    finally:
        launcher.kill()
        launcher.wait()
    text = (tmp_path / "log").read_text()
    step = state_of(tmp_path / "out")["step"]
    assert 1 <= step < STEPS and text.count(f"stopped early at step {step} of {STEPS}") == 1, text
    assert to == "launcher" or f"exitcode  : {STOPPED}" in text, text
    ranks(run_here, 2, data=data)
    same_end(undisturbed, tmp_path / "out")


def lines_so_far(output: Path) -> list[str]:
    path = output / "metrics.jsonl"
    return [line for line in path.read_text().splitlines() if '"lr"' in line] if path.exists() else []


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
