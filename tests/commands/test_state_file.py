"""The file of a run state is used with its saved content, or refused by name."""

import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.commands.conftest import TrainedCandidates
from tests.commands.small_runs import load, run_here, settings
from tests.limits import files_up_to
from twa_scale.average.state import PREVIOUS, STATE, load_state, save_state
from twa_scale.errors import OutputError, StateError


@pytest.fixture(scope="module")
def finished_run(scores: TrainedCandidates, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run of four steps, which tests must not change."""
    output = tmp_path_factory.mktemp("state") / "out"
    run_here(settings(scores.candidates, scores.task, output, checkpoint_every=1))
    return output


@pytest.fixture
def output(finished_run: Path, tmp_path: Path) -> Path:
    """Return a copy of the newest state that a test may damage."""
    shutil.copy(finished_run / STATE, tmp_path / STATE)
    return tmp_path


def plain(value: Any) -> Any:
    """Return nested data with tensors as lists, so that it can be compared."""
    if isinstance(value, torch.Tensor):
        return (str(value.dtype), value.tolist())
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, list | tuple) else value


def refused(output: Path) -> str:
    with pytest.raises(StateError) as caught:
        load_state(output)
    message = str(caught.value)
    assert STATE in message and ("start a new run" in message or "give the output directory" in message)
    return message


# Bytes


def test_any_flipped_bit_is_detected(output: Path) -> None:
    whole = (output / STATE).read_bytes()
    header = whole.index(b"\n") + 1
    generator = random.Random(0)
    bits = [*range(8 * header), *(generator.randrange(8 * header, 8 * len(whole)) for _ in range(300))]
    for bit in bits:
        with (output / STATE).open("r+b") as file:
            file.seek(bit // 8)
            file.write(bytes([whole[bit // 8] ^ 1 << bit % 8]))
            file.flush()
            refused(output)
            file.seek(bit // 8)
            file.write(whole[bit // 8 : bit // 8 + 1])
    assert (output / STATE).read_bytes() == whole


@pytest.mark.parametrize(
    "damage",
    [
        lambda whole: b"",
        lambda whole: whole[:100],
        lambda whole: whole[:-1],
        lambda whole: whole[: len(whole) // 2],
        lambda whole: whole + b"\0",
        lambda whole: whole + whole,
        lambda whole: whole[:4096] + bytes(4096) + whole[8192:],
        lambda whole: bytes(len(whole)),
        lambda whole: b"PK\x03\x04 nonsense",
        lambda whole: b"\x80\x02cos\nsystem\n(S'true'\ntR.",
        lambda whole: whole[whole.index(b"\n") + 1 :],
    ],
    ids=["empty", "100 bytes", "a byte less", "half", "a byte more", "twice", "zeroed page", "zeros", "zip", "pickle",
         "first format"],
)  # fmt: skip
def test_damaged_and_foreign_files(output: Path, damage: Callable[[bytes], bytes]) -> None:
    (output / STATE).write_bytes(damage((output / STATE).read_bytes()))
    refused(output)


def test_another_version_is_named(output: Path) -> None:
    whole = (output / STATE).read_bytes()
    for version in (b"version 1,", b"version 37,"):
        (output / STATE).write_bytes(whole.replace(b"version 2,", version, 1))
        assert version[:-1].decode() in refused(output)


def test_missing_files_raise(output: Path) -> None:
    (output / STATE).unlink()
    assert "no run state" in refused(output)
    os.mkfifo(output / STATE)  # reading it would block
    assert "not a regular file" in refused(output)
    (output / STATE).unlink()
    (output / STATE).mkdir()
    assert "not a regular file" in refused(output)


def test_commands_name_the_file(
    finished_run: Path, scores: TrainedCandidates, output: Path, tmp_path: Path, shell: Any
) -> None:
    (output / STATE).write_bytes((finished_run / STATE).read_bytes()[:-1])
    result = shell("export", output, "--out", tmp_path / "merged")
    assert result.code == 2 and STATE in result.err and "damaged" in result.err
    with pytest.raises(StateError, match=r"state\.pt: is damaged"):
        run_here(settings(scores.candidates, scores.task, output))


# Fields


def modified_state(output: Path, change: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Return the state with a change, as another program could have written it."""
    state = load_state(output).model_dump()
    change(state)
    return state


def replace_state(*path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(state: dict[str, Any]) -> None:
        for key in path[:-1]:
            state = state[key]
        state[path[-1]] = value

    return change


WRONG = [None, "text", -1, 1.5, [3], {"a": 1}, {1: 1}, torch.zeros(2), torch.zeros(3, 3), float("nan")]
FIELDS = ["version", "config", "groups", "group_of", "buffer_names", "x", "coefficients", "center_weights", "optimizer",
          "buffers", "fingerprint"]  # fmt: skip
PATHS = [
    *((field,) for field in ("twa", "step", "finished", "course", "candidates", "keep")),
    *(("kept", field) for field in ("step", "data", "metrics", "x", "coefficients", "buffers")),
    *(("twa", field) for field in FIELDS),
    *(("twa", "fingerprint", field) for field in ("labels", "shapes", "checksums")),
]
ALLOWED = [
    ("course", "{'a': 1}"),
    ("data", "{'a': 1}"),
    ("optimizer", "{'a': 1}"),
    ("group_of", "{'a': 1}"),
]  # other checks refuse it


@pytest.mark.parametrize("path", PATHS, ids=".".join)
def test_wrong_types_and_missing_fields_are_named(output: Path, path: tuple[str, ...]) -> None:
    for value in WRONG:
        if (path[-1], str(value)) in ALLOWED:
            continue
        with pytest.raises(StateError, match=path[-1]):
            save_state(output, modified_state(output, replace_state(*path, value=value)))

    def drop(state: dict[str, Any]) -> None:
        for key in path[:-1]:
            state = state[key]
        del state[path[-1]]

    with pytest.raises(StateError, match=path[-1]):
        save_state(output, modified_state(output, drop))
    with pytest.raises(StateError, match="unknown"):
        save_state(output, modified_state(output, replace_state(*path[:-1], "unknown", value=1)))


@pytest.mark.parametrize("field", ["x", "coefficients", "center_weights"])
def test_a_state_that_is_not_finite_is_not_saved(output: Path, field: str) -> None:
    before = (output / STATE).read_bytes()
    for value in (float("nan"), float("inf")):
        state = load_state(output).model_dump()
        state["twa"][field] = state["twa"][field].clone()
        state["twa"][field][(0,) * state["twa"][field].dim()] = value
        with pytest.raises(StateError, match=rf"{field}.*finite"):
            save_state(output, state)
    assert (output / STATE).read_bytes() == before


# The previous state


def test_previous_state_replaces_a_damaged_one(
    finished_run: Path, scores: TrainedCandidates, tmp_path: Path, shell: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    newest, before = load_state(finished_run), _only(finished_run / PREVIOUS, tmp_path / "one")
    assert newest.step >= before.step > 0
    output = tmp_path / "out"
    shutil.copytree(finished_run, output)
    (output / STATE).write_bytes((finished_run / STATE).read_bytes()[:-1])
    result = shell("export", output, "--out", tmp_path / "merged")
    assert result.code == 0 and "state.pt: is damaged" in result.err and f"{PREVIOUS} is used" in result.err
    assert f"step {before.step}" in result.out
    (output / STATE).unlink()  # as after a kill between two renames
    run_here(settings(scores.candidates, scores.task, output))
    expected, actual = load(finished_run / "average"), load(output / "average")
    assert all(torch.equal(actual[name], value) for name, value in expected.items())
    assert plain(load_state(output).model_dump()) == plain(newest.model_dump())


def _only(path: Path, directory: Path) -> Any:
    directory.mkdir()
    shutil.copy(path, directory / STATE)
    return load_state(directory)


def test_damaged_state_does_not_replace_the_previous_one(output: Path) -> None:
    state = load_state(output).model_dump()
    save_state(output, {**state, "step": 1})
    assert load_state(output).step == 1 and _only(output / PREVIOUS, output / "one").step == state["step"]
    (output / STATE).write_bytes(b"damaged")
    save_state(output, {**state, "step": 2})
    assert load_state(output).step == 2 and _only(output / PREVIOUS, output / "two").step == state["step"]


def test_a_state_that_cannot_be_written_leaves_the_old_one(output: Path) -> None:
    state = load_state(output).model_dump()
    save_state(output, state)
    before = {path.name: path.read_bytes() for path in output.iterdir()}
    with files_up_to(1000), pytest.raises(OutputError, match=r"state.*\.pt"):
        save_state(output, {**state, "step": 3})
    assert {path.name: path.read_bytes() for path in output.iterdir()} == before
