"""Runs on two nodes have the result of one process, also after they were interrupted and requeued."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

from tests.commands.conftest import TrainedCandidates
from tests.commands.small_runs import by_hand, load, run_here, settings, state_of
from tests.slurm.cluster import Cluster
from tests.slurm.conftest import ENDED, ROOT, SCRIPT, Job, with_python

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("slurm")]

STEPS = 40
ENGINES = ["fsdp2", "zero3"]
URGENT = ("sbatch", "--partition=urgent", "--nodes=2", "--output=/dev/null", "--wrap=true")
DISTURBED = {
    "signal": ((), 0.1, ("scancel", "--signal=USR1", "--batch", "JOB")),
    "preempted": ((), 0.1, URGENT),
    "requeued": ((), 0.1, ("scontrol", "requeue", "JOB")),
    "time limit": (("--time=2", "--signal=B:USR1@65"), 3.0, ()),
}


def write_config(scores: TrainedCandidates, directory: Path, engine: str, seconds: float = 0.0) -> Path:
    """Write a run of many steps. Each step takes `seconds` longer in the first start of a job."""
    task = {"name": "tests.commands.interrupted:scores", "seconds": seconds}
    changes = {"steps": STEPS, "engine": engine, "evaluate_every": 10, "checkpoint_every": None}
    directory.mkdir(exist_ok=True)
    config = directory / f"{engine}.yaml"
    config.write_text(yaml.safe_dump(settings(scores.candidates, task, directory / engine, **changes)))
    return config


def steps_of(output: Path) -> list[int]:
    path = output / "metrics.jsonl"
    actual = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [line["step"] for line in actual if "lr" in line]


@pytest.fixture(scope="module")
def whole(slurm: Cluster, scores: TrainedCandidates, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Submit an undisturbed run with an engine, once, and wait for its end. Return its output."""
    directory = tmp_path_factory.mktemp("whole")

    def output(engine: str) -> Path:
        if not (directory / engine).exists():
            config, result = write_config(scores, directory, engine), directory / f"{engine}.log"
            command = ("sbatch", "--parsable", "--output", result, SCRIPT, config)  # `--wait` polls every 32 seconds
            job = Job(slurm, slurm.call(*command, cwd=ROOT, variables=with_python(slurm)), result)
            facts = job.wait(timeout=300)
            assert facts["JobState"] == "COMPLETED", job.said()
            assert facts["NodeList"] == "n[1-2]" and facts["NumTasks"] == "2"
        return directory / engine

    return output


@pytest.mark.parametrize("engine", ENGINES)
def test_both_nodes_make_one_run(
    whole: Callable[[str], Path], scores: TrainedCandidates, tmp_path: Path, engine: str
) -> None:
    output = whole(engine)
    assert json.loads((output / "summary.json").read_text())["ranks"] == 2
    assert steps_of(output) == list(range(1, STEPS + 1))
    run_here(yaml.safe_load(write_config(scores, tmp_path, "plain").read_text()))
    exported, single, sums = (
        load(output / "average"),
        load(tmp_path / "plain" / "average"),
        by_hand(scores.candidates, output),
    )
    assert exported.keys() == single.keys()
    for name, value in exported.items():
        for expected in (single[name], sums[name]):
            assert float((value - expected).norm()) <= 1e-5 * float(expected.norm()), name


@pytest.mark.parametrize(
    ("engine", "mode"),
    [(engine, mode) for engine in ENGINES for mode in DISTURBED if engine == "fsdp2" or mode == "signal"],
)
def test_stopped_run_ends_with_the_same_bits(
    slurm: Cluster,
    submit: Callable[..., Job],
    whole: Callable[[str], Path],
    scores: TrainedCandidates,
    tmp_path: Path,
    engine: str,
    mode: str,
) -> None:
    options, seconds, command = DISTURBED[mode]
    undisturbed, output = whole(engine), tmp_path / engine
    job = submit(write_config(scores, tmp_path, engine, seconds), options=options)
    job.until(lambda: len(steps_of(output)) >= 3 or job.facts["JobState"] in ENDED)
    if command:
        assert job.facts["JobState"] not in ENDED, job.said()
        slurm.call(*(word.replace("JOB", job.number) for word in command))
    facts = job.wait()
    assert facts["JobState"] == "COMPLETED" and int(facts["Restarts"]) >= 1, job.said()
    stopped, continued = (
        re.findall(rf"{word} step (\d+) of {STEPS}", job.said()) for word in ("early at", "continuing from")
    )
    assert stopped and stopped[0] == continued[0] and 0 < int(stopped[0]) < STEPS, job.said()
    assert steps_of(output) == steps_of(undisturbed)
    for key in ("x", "coefficients"):
        assert torch.equal(state_of(output)["twa"][key], state_of(undisturbed)["twa"][key])
    expected, actual = load(undisturbed / "average"), load(output / "average")
    assert expected.keys() == actual.keys() and all(
        torch.equal(actual[name], value) for name, value in expected.items()
    )
