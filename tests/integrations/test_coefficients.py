"""Damaged or different files of coefficients in the checkpoints of trainers are refused."""

import io
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch

import twa_scale
from tests.integrations.small import ROWS, network
from twa_scale import StateError
from twa_scale.average.state.rows_file import remove_rows
from twa_scale.integrations.coefficients import STATE, load_coefficients, named_rows, read_state, save_coefficients


class Other:
    """An object that a state cannot contain."""


def written(value: object, **options: Any) -> bytes:
    body = io.BytesIO()
    torch.save(value, body, **options)
    return body.getvalue()


@pytest.mark.parametrize("zipped", [True, False])
def test_damage_is_an_error_that_names_the_file(zipped: bool, tmp_path: Path) -> None:
    """Files are truncated or changed at any position. Torch's advice to load without weights_only is omitted."""
    path, whole = tmp_path / STATE, written({"x": torch.ones(3)}, _use_new_zipfile_serialization=zipped)
    ends = [whole[:end] for end in range(0, len(whole) - 1, 7)]
    flipped = [whole[:at] + bytes([whole[at] ^ 0x80]) + whole[at + 1 :] for at in range(0, len(whole), 7)]
    refused = 0
    for content in (*ends, *flipped, written(Other(), _use_new_zipfile_serialization=zipped)):
        path.write_bytes(content)
        try:
            read_state(path)
        except StateError as error:
            refused += 1
            assert str(error).startswith(f"{path}: is not the state of an average: it is damaged")
            assert "Resume from another checkpoint." in str(error) and "weights_only" not in str(error)
    assert refused > len(ends) - 3  # padding at the end may be missing


def test_invalid_states_raise(tmp_path: Path) -> None:
    path = tmp_path / STATE
    assert read_state(path) is None
    states = [network(seed).state_dict() for seed in range(3)]
    with closing(twa_scale.attach(network(), states, ROWS)) as twa:
        assert not load_coefficients(twa, tmp_path)
        others: list[Any] = [[], {}, {"rows": []}, "text"]
        for value in others:
            path.write_bytes(written(value))
            with pytest.raises(StateError):
                load_coefficients(twa, tmp_path)
        save_coefficients(twa, tmp_path)
        assert load_coefficients(twa, tmp_path)
    path.unlink()
    path.symlink_to(path)
    with pytest.raises(StateError, match=r"coefficients\.pt: cannot be read: Too many levels of symbolic links"):
        read_state(path)
    path.unlink()
    path.mkdir()
    with pytest.raises(StateError, match="is not a regular file"):
        read_state(path)


def test_invalid_states_refer_to_no_files_of_rows(tmp_path: Path) -> None:
    kept, other, foreign = (tmp_path / name for name in ("state.rows-00000000", "state.rows-11111111", "state.rows-x"))
    for directory in (kept, other, foreign):
        directory.mkdir()
    remove_rows(tmp_path, lambda: None)
    assert len(list(tmp_path.iterdir())) == 3
    states: list[Any] = [[], {}, {"rows": None}, {"rows": []}, {"rows": {"stored": 1}}]
    states += [{"rows": {"stored": {"directory": []}}}, {"rows": {"stored": {"directory": kept.name}}}]
    remove_rows(tmp_path, lambda: named_rows(*states))
    assert set(tmp_path.iterdir()) == {kept, foreign}
