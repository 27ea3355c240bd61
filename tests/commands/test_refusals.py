"""Invalid input at the command line: exit code 2, one message that names the problem, no traceback, no output."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from tests.commands.conftest import CommandResult, TrainedCandidates
from tests.commands.small_runs import run_here, settings
from tests.pool import Pool
from twa_scale.errors import OutputError, TwaError

KINDS = r"(bad configuration|ConfigError|CandidateError|EngineError|OutputError|StateError|NotFiniteError|TwaError): "


def refused(said: CommandResult, *words: str) -> None:
    assert said.code == 2, said
    assert "Traceback" not in said.err and said.out == ""
    assert len(re.findall(KINDS, said.err)) == 1, said.err
    for word in words:
        assert word in said.err, said.err


@pytest.fixture
def config(text: TrainedCandidates, tmp_path: Path) -> Any:
    """Write a configuration of the text run with changes, and return its path."""

    def write(**changes: Any) -> Path:
        path = tmp_path / "run.yaml"
        data = settings(text.candidates, text.task, tmp_path / "out")
        path.write_text(yaml.safe_dump(data | changes))
        return path

    return write


# Configuration


@pytest.mark.parametrize("command", ["run", "plan"])
@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("optimizer.lr=-1", ["override 'optimizer.lr=-1'", "optimizer.lr", "greater than 0"]),
        ("bsis=pca", ["'bsis'", "did you mean 'basis'?"]),
        ("task.modl=byte_gpt", ["task", "'modl'", "did you mean 'model'?"]),
        ("task.model.byte_gpt.n_layers=3", ["task", "n_layers", "'n_layer'"]),
        ("task.name=casual_lm", ["task.name", "'casual_lm'", "did you mean 'causal_lm'?"]),
        ("task.text=[missing/*.txt]", ["task.text", "'missing/*.txt'"]),
        ("split=trian", ["split", "'trian'", "did you mean 'train'?"]),
        ("groups=[a", ["groups=[a", "YAML"]),
        ("include=['[bold]no such[/bold]']", ["include", "'[bold]no such[/bold]'"]),
        ("include=['(']", ["include", "'('"]),
        ("candidates=missing/step-*", ["'missing/step-*'", "matches nothing"]),
        ("candidates=[missing]", ["missing", "no such file"]),
        ("batch_size=100000", ["batch_size", "100000", "'train'"]),
    ],
)
def test_invalid_settings(config: Any, shell: Any, command: str, override: str, words: list[str]) -> None:
    path = config()
    refused(shell(command, path, override), *words)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("evaluate_split=valid", ["split", "'valid'", "did you mean 'validation'?"]),
        ("optimizer.name=adamv", ["optimizer.name", "'adamv'", "adamw"]),
        ("optimizer.betta=3", ["optimizer", "betta"]),
        ("max_shard_size=5XB", ["'5XB'", "5GB"]),
        ("engine=fsdp2", ["engine", "'fsdp2'", "torchrun"]),
        ("micro_batch_size=5", ["batch_size", "12", "5"]),
        ("center=7", ["center", "no candidate 7", "0 to 2"]),
        ("start=9", ["start", "9"]),
        ("basis=simplex start=last", ["simplex"]),
        ("basis=pca num_components=9", ["num_components", "9", "2"]),
        ("exclude=['.']", ["nothing to train"]),
        ("device=cuda", ["device", "'cuda'", "cpu"]),
    ],
)
def test_settings_that_run_refuses_before_it_trains(
    config: Any, shell: Any, tmp_path: Path, override: str, words: list[str]
) -> None:
    if "cuda" in override and torch.cuda.is_available():
        pytest.skip("there is a GPU, and the refusal is of machines without one")
    refused(shell("run", config(), *override.split(" ")), *words)
    assert not (tmp_path / "out/metrics.jsonl").exists()


def test_invalid_configuration_files(shell: Any, tmp_path: Path) -> None:
    refused(shell("run", tmp_path / "missing.yaml"), "missing.yaml", "cannot be read")
    (tmp_path / "run.yaml").write_text("a: [1")
    refused(shell("plan", tmp_path / "run.yaml"), "run.yaml", "YAML")


def test_a_wrong_number_of_ranks(config: Any, shell: Any) -> None:
    refused(shell("plan", config(), "--ranks", 5), "batch_size", "12", "5 ranks")


# Candidates


def path_of(copied: TrainedCandidates, i: int = 1) -> Path:
    return sorted(Path(copied.candidates).parent.glob("step-*"))[i] / "model.safetensors"


def set_fault(copied: TrainedCandidates, kind: str) -> list[str]:
    path = path_of(copied)
    state = load_file(path)
    name = "blocks.1.mlp_in.weight"
    match kind:
        case "nan":
            state[name][3, 4] = float("nan")
            result = [path.parent.name, name, "nan"]
        case "shape":
            state[name] = torch.zeros(3, 3)
            result = [path.parent.name, name, "(3, 3)", "(128, 32)"]
        case "missing":
            state["blocks.1.mlp_inn.weight"] = state.pop(name)
            result = [path.parent.name, name, "missing", "did you mean 'blocks.1.mlp_inn.weight'?"]
        case "integer":
            state[name] = state[name].long()
            result = [path.parent.name, name, "int64"]
        case "truncated":
            path.write_bytes(path.read_bytes()[:-99])
            return [path.parent.name, "truncated"]
        case "garbage":
            path.write_bytes(b"\x10\0\0\0\0\0\0\0[not a header [/b] " + bytes(99))
            return [path.parent.name, "header"]
        case "empty":
            path.unlink()
            return [path.parent.name, "is no candidate"]
        case _:
            raise AssertionError(kind)
    save_file(state, path)
    return result


@pytest.mark.parametrize("kind", ["nan", "shape", "missing", "integer", "truncated", "garbage", "empty"])
@pytest.mark.parametrize("command", ["run", "inspect", "average"])
def test_bad_candidates(shell: Any, copied: TrainedCandidates, tmp_path: Path, kind: str, command: str) -> None:
    words = set_fault(copied, kind)
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(settings(copied.candidates, copied.task, tmp_path / "out")))
    run_program: dict[str, tuple[object, ...]] = {
        "run": (config,),
        "inspect": (copied.candidates,),
        "average": (copied.candidates, "--out", tmp_path / "out"),
    }
    refused(shell(command, *run_program[command]), *words)
    assert not (tmp_path / "out/average").exists() and not list(tmp_path.glob(".out*"))
    assert not list(Path(tmp_path).glob("out/*.safetensors"))


def test_one_candidate(shell: Any, config: Any, copied: TrainedCandidates) -> None:
    path = path_of(copied).parent
    for command in ("run", "plan"):
        refused(shell(command, config(), f"candidates={path}"), "found 1", path.name, "at least 2")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["{0}:0.5", "{1}"], ["step-", "no weight", "PATH:WEIGHT"]),
        (["{0}:nan", "{1}:1"], ["nan", "finite"]),
        (["{0}:inf", "{1}:1"], ["inf", "finite"]),
        (["{0}:0.5", "{1}:0.5", "--weights", "ema:0.9"], ["--weights", "ema:0.9"]),
        (["{*}:0.5"], ["1 weights", "3 candidates"]),
        (["{*}", "--weights", "emma:0.9"], ["--weights", "emma:0.9"]),
        (["{*}", "--weights", "ema:2"], ["--weights", "0 < DECAY < 1"]),
        (["{*}", "--dtype", "float31"], ["dtype", "'float31'", "did you mean 'float32'?"]),
        (["{*}", "--dtype", "int8"], ["dtype", "'int8'"]),
        (["{*}", "--max-shard-size", "5XB"], ["'5XB'", "5GB"]),
        (["{0}x"], ["no such file"]),
    ],
)
def test_average(text: TrainedCandidates, shell: Any, tmp_path: Path, words: list[str], message: list[str]) -> None:
    paths = sorted(Path(text.candidates).parent.glob("step-*"))
    run_program = [
        w.replace("{*}", text.candidates).replace("{0}", str(paths[0])).replace("{1}", str(paths[1])) for w in words
    ]
    refused(shell("average", *run_program, "--out", tmp_path / "out"), *message)
    assert list(tmp_path.iterdir()) == []


# Outputs


def test_outputs_that_cannot_be_written(text: TrainedCandidates, config: Any, shell: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    occupied = tmp_path / "occupied"
    occupied.mkdir()
    (occupied / "thesis.tex").write_text("mine")
    for out, word in ((tmp_path / "file", "file"), (tmp_path / "file/below", "below"), (occupied, "not empty")):
        refused(shell("average", text.candidates, "--out", out), word)
    refused(shell("average", text.candidates, "--out", occupied, "--overwrite"), "no weights")
    refused(shell("average", text.candidates, "--out", Path(text.candidates).parent, "--overwrite"), "candidate")
    for out in (tmp_path / "file", tmp_path / "file/below"):
        refused(shell("run", config(), f"output={out}"), str(out))
    result = shell("inspect", text.candidates, "--json", "--plot", tmp_path / "file/plot.png")
    refused(CommandResult(result.code, "", result.err), "plot.png")  # the results are printed nevertheless
    assert (tmp_path / "file").read_text() == "mine" and (occupied / "thesis.tex").read_text() == "mine"


def test_error_is_one_paragraph(shell: Any, tmp_path: Path) -> None:
    """Without a terminal there is no progress bar and no empty line."""
    for words in (("average", tmp_path / "a", "--out", tmp_path / "out"), ("inspect", tmp_path / "a")):
        assert shell(*words).err.startswith(f"CandidateError: {tmp_path / 'a'}: ")


def test_directories_without_a_run(shell: Any, tmp_path: Path) -> None:
    refused(shell("export", tmp_path, "--out", tmp_path / "out"), "state.pt", "no run state")
    (tmp_path / "state.pt").write_text("hello")
    refused(shell("export", tmp_path, "--out", tmp_path / "out"), "state.pt", "not a run state")
    torch.save({"twa": {"fingerprint": 3}}, tmp_path / "state.pt")
    refused(shell("export", tmp_path, "--out", tmp_path / "out"), "state.pt", "not a run state", "does not begin with")


def test_custom_task_that_is_not_a_task(config: Any, shell: Any) -> None:
    module_name = "tests.commands.small_runs"
    for name, words in (
        ("no_such_module_anywhere:f", ["no_such_module_anywhere", "PYTHONPATH"]),
        (f"{module_name}:score", ["'score'", "did you mean 'scores'?"]),
        (f"{module_name}:half_a_task", ["half_a_task", "Linear", "dataset"]),
    ):
        refused(shell("run", config(task={"name": name})), *words)
    refused(shell("run", config(task={"name": f"{module_name}:scores", "dye_at": 3})), "dye_at", "'die_at'")


def test_a_task_in_the_present_directory_is_found(
    config: Any, shell: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "task_in_this_directory.py").write_text("def number():\n    return 3\n")
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)
    refused(shell("plan", config(task={"name": "task_in_this_directory:number"})), "returned int", "dataset")


def test_a_split_without_a_whole_batch(shell: Any, scores: TrainedCandidates, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(settings(scores.candidates, scores.task, tmp_path / "out", batch_size=61)))
    refused(shell("run", path), "batch_size", "'train'", "60 examples")


# The command line


OPTIONS = {
    "run": ["CONFIG", "OVERRIDES", "torchrun", "optimizer.lr"],
    "plan": ["CONFIG", "OVERRIDES", "--ranks", "--json"],
    "inspect": ["CANDIDATES", "--plot", "--json"],
    "average": [
        "CANDIDATES",
        "--out",
        "--weights",
        "--max-shard-size",
        "--dtype",
        "--overwrite",
        "minus-sqrt",
        "ema:0.9",
    ],
    "export": ["RUN", "--out", "--max-shard-size", "--dtype", "--overwrite", "live weights"],
}


@pytest.mark.parametrize("command", OPTIONS)
def test_help_lists_all_options(shell: Any, command: str) -> None:
    result = shell(command, "--help")
    assert result.code == 0
    text = re.sub(r"[\s│]+", " ", result.out)
    assert all(option.lower() in text.lower() for option in OPTIONS[command]), result.out


def test_help_lists_the_commands(shell: Any) -> None:
    for words in (["--help"], ["-h"]):
        result = shell(*words)
        assert result.code == 0 and all(command in result.out for command in OPTIONS)


@pytest.mark.parametrize(
    "words",
    [["avrage"], ["average", "a"], ["plan"], ["plan", "a", "--ranks", "0"], ["inspect"], ["run", "a", "--nope"]],
    ids=" ".join,
)
def test_unknown_commands(shell: Any, words: list[str]) -> None:
    result = shell(*words)
    assert result.code == 2 and "Usage" in result.err and "Traceback" not in result.err


# In a separate process


def run_program(*words: object, **environment: str) -> "subprocess.CompletedProcess[str]":
    variables = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return subprocess.run(
        [sys.executable, *map(str, words)],
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
        env=variables | {"COLUMNS": "200", "OMP_NUM_THREADS": "1", **environment},
    )


def test_command_prints_one_message(config: Any) -> None:
    result = run_program("-m", "twa_scale", "run", config(), "basiss=pca")
    refused(CommandResult(result.returncode, result.stdout, result.stderr), "'basiss'", "did you mean 'basis'?")


@pytest.mark.slow
def test_torchrun(config: Any) -> None:
    """Two ranks with the same error print it once."""
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2, "-m", "twa_scale", "run")
    result = run_program(*launch, config(), "candidates=missing/*")
    assert result.returncode != 0 and len(re.findall(KINDS, result.stderr)) == 1, result.stderr


# On several ranks


def test_data_that_one_rank_lacks(ranks: Pool, scores: TrainedCandidates, tmp_path: Path) -> None:
    """DDP exchanges shapes at construction. A rank that failed before must not block the others."""
    for engine in ("ddp", "fsdp2"):
        task = scores.task | {"broken_rank": 1}
        outcomes = ranks.outcomes(run_here, 2, data=settings(scores.candidates, task, tmp_path, engine=engine))
        assert all("not mounted on this node" in str(outcome.error) for outcome in outcomes)


def test_invalid_runs_raise_on_every_rank(ranks: Pool, scores: TrainedCandidates, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for changes in (
        {"output": str(tmp_path / "file/below")},
        {"candidates": str(tmp_path / "step-*")},
        {"max_shard_size": "5XB"},
        {"batch_size": 13},
        {"optimizer": {"name": "adamw", "momentum": 3}},
    ):
        data = settings(scores.candidates, scores.task, tmp_path / "out") | changes
        assert isinstance(ranks.error(run_here, 2, data=data), TwaError)


@pytest.mark.parametrize("name", ["config.json", "summary.json", "state.pt", "loggers.json"])
@pytest.mark.parametrize("resume", [False, True])
def test_files_of_others_in_the_output_are_kept(
    scores: TrainedCandidates, tmp_path: Path, name: str, resume: bool
) -> None:
    """A run would replace them, such as the configuration of a model that was saved there."""
    content = json.dumps({"model_type": "bert"}).encode()
    (tmp_path / name).write_bytes(content)
    message = "is not a run state" if resume and name == "state.pt" else f"holds '{name}', which the run would replace"
    with pytest.raises(TwaError, match=message):
        run_here(settings(scores.candidates, scores.task, tmp_path, resume=resume))
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [(name, content)]


def test_a_candidate_that_the_average_would_replace_is_refused_before_a_run(
    scores: TrainedCandidates, tmp_path: Path
) -> None:
    sources = sorted(Path(scores.candidates).parent.glob(Path(scores.candidates).name))
    shutil.copytree(sources[0], tmp_path / "out" / "average")
    before = sorted((tmp_path / "out").rglob("*"))
    data = settings("", scores.task, tmp_path / "out") | {
        "candidates": [str(sources[1]), str(tmp_path / "out/average")]
    }
    with pytest.raises(OutputError, match="holds"):
        run_here(data)
    assert sorted((tmp_path / "out").rglob("*")) == before


def test_a_run_that_has_failed_early_does_not_block_its_output(scores: TrainedCandidates, tmp_path: Path) -> None:
    """Services begin before candidates are read, and config.json is written afterwards."""
    (tmp_path / "loggers.json").write_text(json.dumps({"wandb": "abc"}))
    run_here(settings(scores.candidates, scores.task, tmp_path))
    assert (tmp_path / "config.json").exists()


def test_an_output_that_is_a_candidate_is_refused(scores: TrainedCandidates, tmp_path: Path) -> None:
    for source in sorted(Path(scores.candidates).parent.glob(Path(scores.candidates).name)):
        shutil.copytree(source, tmp_path / source.name)
    output = min(tmp_path.iterdir())
    before = sorted(path.name for path in output.iterdir())
    with pytest.raises(OutputError, match="is a candidate"):
        run_here(settings(f"{tmp_path}/*", scores.task, output))
    assert sorted(path.name for path in output.iterdir()) == before
