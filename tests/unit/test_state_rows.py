"""The file of rows of a state: each state has its own, also after kills and changes to files."""

import os
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import nn

import twa_scale
from tests.states import values_of_rows
from twa_scale import OutputError, StateError, TrainableAverage
from twa_scale.average.rows import stored
from twa_scale.average.state import PREVIOUS, STATE, load_state, save_state
from twa_scale.average.state import file as state_file

ROWS: dict[str, Any] = {"groups": "tensor+row", "optimizer": {"name": "adamw", "lr": 0.1}}
REST: dict[str, Any] = {"keep": "best", "finished": False, "course": {}, "candidates": ["a", "b"]}


def average() -> TrainableAverage:
    torch.manual_seed(0)
    candidates = [{"weight": torch.randn(5, 3), "bias": torch.randn(5)} for _ in range(2)]
    return twa_scale.attach(nn.Linear(3, 5), candidates, ROWS)


def train(twa: TrainableAverage) -> None:
    twa._engine.module(torch.ones(1, 3)).square().sum().backward()
    twa.step()
    twa.zero_grad()


def save(twa: TrainableAverage, output: Path, step: int, *, whole: bool = False) -> None:
    """Save as a run does, with the best average, that of the last save."""
    content = twa.copy_values()
    kept = {"step": 0, "data": {"metric": "loss"}, "metrics": {"loss": 1.0}, "x": content.x}
    kept |= {"coefficients": content.coefficients, "buffers": {}}
    state = twa.state_dict() if whole else twa.state_dict(output, best=content)
    if whole:
        kept["row_values"] = state["rows"]["values"]
    save_state(output, {"twa": state, "kept": kept, "step": step, **REST})


def places(output: Path) -> set[str]:
    return {path.name for path in output.glob("state.rows-*")}


def values(output: Path) -> torch.Tensor:
    return values_of_rows(load_state(output).twa, output)["weight"]


@pytest.fixture
def twa() -> TrainableAverage:
    return average()


def test_each_state_has_a_file_and_older_ones_are_removed(twa: TrainableAverage, tmp_path: Path) -> None:
    """Files of killed processes are removed, too, but not those of others."""
    actual = []
    (tmp_path / "state.rows-of-someone").mkdir()
    for step in range(4):
        train(twa)
        save(twa, tmp_path, step)
        actual.append(values(tmp_path))
        assert len(places(tmp_path) - {"state.rows-of-someone"}) == min(step + 1, 2)
        if step == 2:
            twa.state_dict(tmp_path)  # the process is killed before it has written state.pt
            assert load_state(tmp_path).step == 2 and torch.equal(values(tmp_path), actual[2])
            assert len(places(tmp_path)) == 4
    assert not any(torch.equal(first, second) for first, second in pairwise(actual))
    (tmp_path / STATE).unlink()
    assert load_state(tmp_path).step == 2 and torch.equal(values(tmp_path), actual[2])
    state_file.forget_state(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"state.rows-of-someone"}


def test_a_save_that_fails_leaves_what_was_there(twa: TrainableAverage, tmp_path: Path) -> None:
    for step in range(2):
        save(twa, tmp_path, step)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for place in (stored.__name__ + ".digest", state_file.__name__ + ".replace_file"):
        with patch(place, side_effect=OutputError("full")), pytest.raises(OutputError, match="full"):
            save(twa, tmp_path, 3)
        assert load_state(tmp_path).step == 1
    save(
        twa, tmp_path, 2
    )  # removes the files of the first, as after a kill between writing the file and naming it in the state
    assert len(places(tmp_path)) == 2 and load_state(tmp_path).step == 2
    unchanged = [path for path in before if path.exists() and path.read_bytes() == before[path]]
    assert len(unchanged) == 1, "the rows of the state before"
    twa._rows.values.data[0, 0] = torch.nan  # type: ignore[union-attr]
    with pytest.raises(OutputError, match=r"'last/weight', element 0: holds nan"):
        twa.state_dict(tmp_path)
    assert len(places(tmp_path)) == 2


def test_rows_are_read_while_a_run_saves_newer_ones(twa: TrainableAverage, tmp_path: Path) -> None:
    """As with `twa-scale export` of a run that continues."""
    save(twa, tmp_path, 0)
    rows, expected = load_state(tmp_path).twa.rows, values(tmp_path)
    assert rows is not None and rows.stored is not None
    with rows.reader(tmp_path) as read:
        for step in range(1, 4):
            train(twa)
            save(twa, tmp_path, step)
        assert rows.stored.directory not in places(tmp_path)
        assert torch.equal(read("weight"), expected) and not torch.equal(values(tmp_path), expected)
    with pytest.raises(StateError, match="No such file"), rows.reader(tmp_path):
        pass


DAMAGE = {
    "missing": "is missing",
    "a byte": "does not have the checksum",
    "shorter": "does not have the checksum",
    "of another state": "does not have the checksum",
    "fifo": "cannot be read",
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_rows_are_named_and_the_previous_state_is_used(
    twa: TrainableAverage, tmp_path: Path, damage: str
) -> None:
    for step in range(2):
        save(twa, tmp_path, step)
        train(twa)
    place = load_state(tmp_path).twa.rows.stored.directory  # type: ignore[union-attr]
    path = tmp_path / place / "rows.safetensors"
    (other,) = places(tmp_path) - {place}
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.unlink()
    match damage:
        case "a byte":
            path.write_bytes(content)
        case "shorter":
            path.write_bytes(content[:100])
        case "of another state":
            path.write_bytes((tmp_path / other / path.name).read_bytes())
        case "fifo":
            os.mkfifo(path)
    messages: list[str] = []
    assert load_state(tmp_path, messages.append).step == 0
    assert str(path) in messages[0] and DAMAGE[damage] in messages[0] and PREVIOUS in messages[0]
    assert load_state(tmp_path, rows="none").step == 1, "rows are not needed"
    assert load_state(tmp_path, rows="size").step == int(damage == "a byte"), "rows are not read"
    state = twa.state_dict(tmp_path)
    state["rows"]["stored"]["directory"] = place
    with pytest.raises(StateError, match=DAMAGE[damage]):
        twa.load_state_dict(state, tmp_path)
    state_file.keep_loaded(tmp_path, load_state(tmp_path))
    save(twa, tmp_path, 2)
    assert load_state(tmp_path).step == 2 and place not in places(tmp_path)
    (tmp_path / STATE).unlink()
    assert load_state(tmp_path).step == 0, "the damaged state has replaced the good one before"


def test_rows_of_another_model_and_other_files_are_refused(twa: TrainableAverage, tmp_path: Path) -> None:
    state = twa.state_dict(tmp_path)
    with pytest.raises(StateError, match="Give load_state_dict the directory"):
        twa.load_state_dict(state)
    for key, value in (("directory", "../rows"), ("directory", "state.rows-0"), ("sha256", "x"), ("nbytes", -1)):
        stored_as = {**state["rows"]["stored"], key: value}
        with pytest.raises(StateError, match=rf"rows\.stored\.{key}"):
            twa.load_state_dict({**state, "rows": {**state["rows"], "stored": stored_as}}, tmp_path)
    with pytest.raises(StateError, match="does not have those of the best average"):
        kept = {"step": 0, "data": {"metric": "loss"}, "metrics": {"loss": 1.0}, "x": state["x"], "buffers": {}}
        kept["coefficients"] = state["coefficients"]
        save_state(tmp_path, {"twa": state, "kept": kept, "step": 0, **REST})
    assert not places(tmp_path), "of a state that is refused"
    state = twa.state_dict(tmp_path)
    candidates = [{"weight": torch.randn(6, 3), "bias": torch.randn(6)} for _ in range(2)]
    other = twa_scale.attach(nn.Linear(3, 6), candidates, ROWS)
    rows = {**other.state_dict()["rows"], "stored": state["rows"]["stored"], "values": {}}
    with pytest.raises(StateError, match=r"rows: last: 'weight' has shape \(2, 5\) in the state, and \(2, 6\) here"):
        other.load_state_dict({**other.state_dict(), "rows": rows}, tmp_path)


def test_a_state_with_all_rows_in_it_is_still_read(twa: TrainableAverage, tmp_path: Path) -> None:
    """Such states were written before version 0.1 had files of rows."""
    train(twa)
    save(twa, tmp_path, 0, whole=True)
    state = load_state(tmp_path)
    assert not places(tmp_path) and state.kept and state.exported.rows and state.exported.rows.values
    second = average()
    second.load_state_dict(state.twa.model_dump())
    for instance in (twa, second):
        train(instance)
    assert torch.equal(twa.copy_values().rows, second.copy_values().rows)  # type: ignore[arg-type]
