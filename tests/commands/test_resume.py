"""An interrupted run continues with the same steps and the same bits, on any number of ranks."""

import json
import os
import shutil
from collections.abc import Callable
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from tests.commands.conftest import TrainedCandidates
from tests.commands.small_runs import load, run_here, settings, state_of
from tests.grid import rest_slow
from tests.pool import Pool
from twa_scale.errors import OutputError, StateError, TwaError
from twa_scale.merge import export_run
from twa_scale.output import DirectoryLock

STEPS = 8
EVERY = 2
FAILING_STEP = 6  # the loss of this step raises; the last saved state is that of step 4


def run_settings(trained_candidates: TrainedCandidates, output: Path, **changes: Any) -> dict[str, Any]:
    usual = {"steps": STEPS, "checkpoint_every": EVERY, "evaluate_every": EVERY, "engine": "auto", "max_grad_norm": 1.0}
    return settings(trained_candidates.candidates, trained_candidates.task, output, **usual | changes)


def interrupted_settings(trained_candidates: TrainedCandidates) -> TrainedCandidates:
    return TrainedCandidates(trained_candidates.task | {"die_at": FAILING_STEP}, trained_candidates.candidates)


def run_and_die(ranks: Pool, size: int, data: dict[str, Any]) -> None:
    outcomes = ranks.outcomes(run_here, size, data=data)
    assert all("the machine is gone" in str(outcome.error) for outcome in outcomes)


def lines(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def undisturbed(
    ranks: Pool, scores: TrainedCandidates, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, int], Path]:
    """Return the output of a run of an engine on a number of ranks; made once."""

    @cache
    def run(engine: str, size: int) -> Path:
        output = tmp_path_factory.mktemp("whole") / "out"
        ranks(run_here, size, data=run_settings(scores, output, engine=engine))
        return output

    return run


@pytest.mark.parametrize(
    ("engine", "size"), [("plain", 1), pytest.param("ddp", 2, marks=pytest.mark.slow), ("fsdp2", 2)]
)
def test_the_same_ranks_end_with_the_same_bits(
    ranks: Pool,
    undisturbed: Callable[[str, int], Path],
    scores: TrainedCandidates,
    tmp_path: Path,
    engine: str,
    size: int,
) -> None:
    run_and_die(ranks, size, run_settings(interrupted_settings(scores), tmp_path, engine=engine))
    assert state_of(tmp_path)["step"] == 4 and not (tmp_path / "average").exists()
    assert [line["step"] for line in lines(tmp_path) if "loss" in line] == [1, 2, 3, 4, 5]
    ranks(run_here, size, data=run_settings(scores, tmp_path, engine=engine))
    whole, continued = undisturbed(engine, size), tmp_path
    for key in ("x", "coefficients"):
        assert torch.equal(state_of(whole)["twa"][key], state_of(continued)["twa"][key])
    expected, actual = load(whole / "average"), load(continued / "average")
    assert all(torch.equal(actual[name], value) for name, value in expected.items())
    loose = ("seconds",)
    messages = [[{k: v for k, v in line.items() if k not in loose} for line in lines(o)] for o in (whole, continued)]
    assert messages[0] == messages[1]  # each step and evaluation occurs once, with the same numbers


@pytest.mark.parametrize(("before", "after"), [(2, 1), pytest.param(1, 2, marks=pytest.mark.slow), (2, 3)])
def test_other_ranks_end_with_the_same_weights(
    ranks: Pool,
    undisturbed: Callable[[str, int], Path],
    scores: TrainedCandidates,
    tmp_path: Path,
    before: int,
    after: int,
) -> None:
    run_and_die(ranks, before, run_settings(interrupted_settings(scores), tmp_path))
    ranks(run_here, after, data=run_settings(scores, tmp_path))
    expected, actual = load(undisturbed("plain", 1) / "average"), load(tmp_path / "average")
    for name, value in expected.items():
        assert float((actual[name] - value).norm()) <= 1e-6 * float(value.norm()), name
    assert [line["step"] for line in lines(tmp_path) if "loss" in line] == list(range(1, STEPS + 1))


def test_batchnorm_and_other_optimizers_continue(digits: TrainedCandidates, tmp_path: Path) -> None:
    """The state includes the momentum of SGD and the statistics of BatchNorm. The first run ended early."""
    changes = {"optimizer": {"name": "sgd", "lr": 0.5, "momentum": 0.9}, "recalibrate_batches": 3, "batch_size": 24}
    run_here(run_settings(digits, tmp_path / "whole", **changes))
    run_here(run_settings(digits, tmp_path / "parts", **changes))
    state = state_of(tmp_path / "parts")
    for name in ("average", "summary.json"):
        assert (tmp_path / "parts" / name).exists()
    assert state["step"] == STEPS
    expected, actual = load(tmp_path / "whole/average"), load(tmp_path / "parts/average")
    assert all(torch.equal(actual[name], value) for name, value in expected.items())


def directory_content(output: Path) -> dict[Path, tuple[int, bytes]]:
    """Return the times and the content of all files of a directory, and of the directory itself."""
    return {
        path: (path.stat().st_mtime_ns, path.read_bytes() if path.is_file() else b"")
        for path in (output, *output.rglob("*"))
    }


@pytest.mark.parametrize("size", [1, 2])
def test_finished_run_does_not_change(
    ranks: Pool, copied_candidates: TrainedCandidates, tmp_path: Path, size: int
) -> None:
    output = tmp_path / "out"
    summary = ranks(run_here, size, data=run_settings(copied_candidates, output))[0]
    before = directory_content(output)
    repeated = ranks(
        run_here, size, data=run_settings(interrupted_settings(copied_candidates), output)
    )  # the loss is not called
    assert directory_content(output) == before
    assert repeated == [json.loads(json.dumps(summary))] * size
    for path in Path(copied_candidates.candidates).parent.glob("step-*"):
        (path / "model.safetensors").unlink()
        path.rmdir()
    ranks(run_here, size, data=run_settings(copied_candidates, output))  # the candidates are no longer needed
    assert directory_content(output) == before


def test_finished_run_is_reported(scores: TrainedCandidates, tmp_path: Path, shell: Any) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(run_settings(scores, tmp_path / "out")))
    assert shell("run", config).code == 0
    result = shell("run", config)
    assert result.code == 0 and f"has finished its {STEPS} steps; nothing was done" in result.err
    assert "resume=false" in result.err and "more steps" in result.err


def test_results_that_are_missing_are_written_again(scores: TrainedCandidates, tmp_path: Path) -> None:
    run_here(run_settings(scores, tmp_path))
    before, messages = load(tmp_path / "average"), lines(tmp_path)
    (tmp_path / "summary.json").write_text('{"steps": 8')
    run_here(run_settings(scores, tmp_path))
    assert json.loads((tmp_path / "summary.json").read_text())["steps"] == STEPS
    shutil.rmtree(tmp_path / "average")
    run_here(run_settings(scores, tmp_path))
    after = load(tmp_path / "average")
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert lines(tmp_path) == messages


@pytest.mark.parametrize("unfinished", [False, True])
def test_steps_can_be_increased(
    scores: TrainedCandidates, tmp_path: Path, capsys: pytest.CaptureFixture[str], unfinished: bool
) -> None:
    """The rate of each further step is that of the longer schedule."""
    if unfinished:
        stopped(scores, tmp_path / "out")
    else:
        run_here(run_settings(scores, tmp_path / "out"))
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(run_settings(scores, tmp_path / "out", steps=12)))
    done = 4 if unfinished else STEPS
    assert run_here(run_settings(scores, tmp_path / "out", steps=12))["steps"] == 12
    run_here(run_settings(scores, tmp_path / "long", steps=12))
    rates = [[line["lr"] for line in lines(tmp_path / name) if "lr" in line] for name in ("out", "long")]
    assert len(rates[0]) == 12 and rates[0][done:] == rates[1][done:] and rates[0][:done] != rates[1][:done]
    assert state_of(tmp_path / "out")["step"] == 12
    with pytest.raises(StateError, match=r"steps was 12 .* and is 8 now.*raised, not lowered"):
        run_here(run_settings(scores, tmp_path / "out"))


def test_schedule_that_ended_at_zero_continues(scores: TrainedCandidates, tmp_path: Path, shell: Any) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(run_settings(scores, tmp_path / "out", steps=4)))
    assert shell("run", config).code == 0
    result = shell("run", config, "steps=6")
    assert result.code == 0
    assert "continuing from step 4 of 6, which were 4: the learning rate follows the schedule of 6" in result.err


@pytest.mark.parametrize(
    ("content", "name"),
    rest_slow(
        product(
            [b"\xff\xfe\x00 not UTF-8", b"", b"[1, 2]\n", b'{"step": "x"}\n3\n'],
            ["metrics.jsonl", "config.json", "summary.json"],
        ),
        lambda content, name: name == "metrics.jsonl" or content.startswith(b"\xff"),
    ),
    ids=str,
)
def test_other_files_next_to_the_state_do_not_prevent_a_resume(
    scores: TrainedCandidates, tmp_path: Path, name: str, content: bytes
) -> None:
    stopped(scores, tmp_path)
    (tmp_path / name).write_bytes(content)
    run_here(run_settings(scores, tmp_path))
    done = [line["step"] for line in lines(tmp_path) if "loss" in line]
    assert done == list(range(5 if name == "metrics.jsonl" else 1, STEPS + 1))
    assert json.loads((tmp_path / "summary.json").read_text())["steps"] == STEPS


def test_one_run_at_a_time(scores: TrainedCandidates, tmp_path: Path) -> None:
    """The second run names the first one and changes nothing. An export of existing results is possible."""
    stopped(scores, tmp_path)
    with DirectoryLock(tmp_path) as lock:
        lock.take()
        before = directory_content(tmp_path)
        named = rf"another run.*process {os.getpid()} on host .*, started .*choose another"
        with pytest.raises(OutputError, match=named):
            run_here(run_settings(scores, tmp_path))
        export_run(tmp_path, tmp_path.parent / f"{tmp_path.name}-merged")
        assert directory_content(tmp_path) == before
    run_here(run_settings(scores, tmp_path))
    assert not (tmp_path / ".lock").exists()


def test_resume_can_be_refused(scores: TrainedCandidates, tmp_path: Path) -> None:
    run_here(run_settings(scores, tmp_path, seed=1))
    first = state_of(tmp_path)["twa"]["x"]
    run_here(run_settings(scores, tmp_path, seed=2, resume=False))
    assert state_of(tmp_path)["step"] == STEPS and not torch.equal(state_of(tmp_path)["twa"]["x"], first)
    assert [line["step"] for line in lines(tmp_path) if "loss" in line] == list(range(1, STEPS + 1))


def test_crash_before_the_first_save_restarts(scores: TrainedCandidates, tmp_path: Path) -> None:
    dead = TrainedCandidates(scores.task | {"die_at": 2}, scores.candidates)
    with pytest.raises(RuntimeError, match="gone"):
        run_here(run_settings(dead, tmp_path))
    run_here(run_settings(scores, tmp_path))
    assert [line["step"] for line in lines(tmp_path) if "loss" in line] == list(range(1, STEPS + 1))


def test_incomplete_line_is_dropped(scores: TrainedCandidates, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="gone"):
        run_here(run_settings(interrupted_settings(scores), tmp_path))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')
    run_here(run_settings(scores, tmp_path))
    assert [line["step"] for line in lines(tmp_path) if "loss" in line] == list(range(1, STEPS + 1))


# Runs that must not continue


def stopped(trained_candidates: TrainedCandidates, output: Path) -> None:
    with pytest.raises(RuntimeError, match="gone"):
        run_here(run_settings(interrupted_settings(trained_candidates), output))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 7}, ["state.pt", "steps was 8", "7", "raised"]),
        ({"basis": "pca"}, ["basis", "'normalized'", "'pca'"]),
        ({"groups": "global"}, ["groups", "'tensor'", "'global'"]),
        ({"units": "weight"}, ["units"]),
        ({"center": "last"}, ["center"]),
        ({"exclude": ["bias"]}, ["exclude"]),
        ({"optimizer": {"name": "sgd", "lr": 0.1}}, ["optimizer", "'adamw'", "'sgd'"]),
    ],
    ids=str,
)
def test_changed_settings_of_the_coefficients_raise(
    scores: TrainedCandidates, tmp_path: Path, changes: dict[str, Any], message: list[str]
) -> None:
    stopped(scores, tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    with pytest.raises(StateError) as caught:
        run_here(run_settings(scores, tmp_path, **changes))
    assert all(word in str(caught.value) for word in message), str(caught.value)
    assert {path: path.read_bytes() for path in before} == before  # config.json still describes state.pt


@pytest.fixture
def copied_candidates(scores: TrainedCandidates, tmp_path: Path) -> TrainedCandidates:
    (tmp_path / "mine").mkdir()
    for path in Path(scores.candidates).parent.glob("step-*"):
        (tmp_path / "mine" / path.name).mkdir()
        save_file(load(path), tmp_path / "mine" / path.name / "model.safetensors")
    return TrainedCandidates(scores.task, str(tmp_path / "mine" / "step-*"))


def change(trained_candidates: TrainedCandidates) -> Path:
    path = sorted(Path(trained_candidates.candidates).parent.glob("step-*"))[1] / "model.safetensors"
    state = load_file(path)
    state["3.weight"][0, 4] += 1e-3
    save_file(state, path)
    return path


@pytest.mark.parametrize("size", [1, 2])
def test_a_changed_candidate_is_named(
    ranks: Pool, copied_candidates: TrainedCandidates, tmp_path: Path, size: int
) -> None:
    output = tmp_path / "out"
    run_and_die(ranks, size, run_settings(interrupted_settings(copied_candidates), output))
    changed = change(copied_candidates)
    error = ranks.error(run_here, size, data=run_settings(copied_candidates, output))
    assert isinstance(error, StateError) and changed.parent.name in str(error) and "'3.weight'" in str(error)


def test_removed_or_reordered_candidates(copied_candidates: TrainedCandidates, tmp_path: Path) -> None:
    stopped(copied_candidates, tmp_path / "out")
    paths = [str(path) for path in sorted(Path(copied_candidates.candidates).parent.glob("step-*"))]
    for other in (paths[:2], paths[::-1]):
        with pytest.raises(StateError):
            run_here(run_settings(TrainedCandidates(copied_candidates.task, other), tmp_path / "out"))  # type: ignore[arg-type]
    run_here(run_settings(TrainedCandidates(copied_candidates.task, paths), tmp_path / "out"))  # type: ignore[arg-type]


def test_export_of_changed_or_missing_candidates(
    copied_candidates: TrainedCandidates, tmp_path: Path, shell: Any
) -> None:
    run_here(run_settings(copied_candidates, tmp_path / "out"))
    changed = change(copied_candidates)
    result = shell("export", tmp_path / "out", "--out", tmp_path / "merged")
    assert result.code == 2 and changed.parent.name in result.err and "'3.weight'" in result.err
    changed.unlink()
    result = shell("export", tmp_path / "out", "--out", tmp_path / "merged")
    assert result.code == 2 and changed.parent.name in result.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "out"]


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 nonsense", b"\x80\x02cos\nsystem\n(S'true'\ntR."])
def test_files_without_a_state_are_refused(scores: TrainedCandidates, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "state.pt").write_bytes(content)
    with pytest.raises(StateError, match=r"state\.pt"):
        run_here(run_settings(scores, tmp_path))


def test_state_of_an_average_is_refused_as_state_of_a_run(scores: TrainedCandidates, tmp_path: Path) -> None:
    run_here(run_settings(scores, tmp_path))
    twa = state_of(tmp_path)["twa"]
    (tmp_path / "state.previous.pt").unlink()
    for state in (twa, {"twa": twa}, {"twa": 3}, [twa]):
        torch.save(state, tmp_path / "state.pt")
        with pytest.raises(TwaError, match=r"state\.pt"):
            run_here(run_settings(scores, tmp_path))
