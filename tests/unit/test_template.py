"""The configuration that `twa-scale init` writes."""

import re
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from twa_scale.cli import app
from twa_scale.config import load_config
from twa_scale.config.run import RunConfig


@pytest.mark.parametrize(
    "task", ["causal_lm", "sequence_classification", "image_classification", "object_detection", "mine:make"]
)
def test_the_file_is_a_configuration(tmp_path: Path, task: str) -> None:
    file = tmp_path / "twa.yaml"
    options = ["--candidates", "a b/*: c", "--task", task, "--output", "out"]
    messages = CliRunner().invoke(app, ["init", str(file), *options], catch_exceptions=False)
    config = load_config(file, [])
    assert (config.candidates, config.task.name, config.output, config.steps) == ("a b/*: c", task, "out", 100)
    assert "twa-scale plan" in messages.output


def test_commented_keys_are_the_defaults(tmp_path: Path) -> None:
    file = tmp_path / "twa.yaml"
    CliRunner().invoke(app, ["init", str(file)], catch_exceptions=False)
    text = file.read_text()
    keys = r"^# ((?:  )?[a-z_]+:( .*)?)$"  # no explanation begins with one lower-case word and a colon
    actual = yaml.safe_load(re.sub(keys, r"\1", text, flags=re.MULTILINE))
    assert actual.keys() == RunConfig.model_fields.keys()
    assert {**RunConfig(**actual).model_dump()} == load_config(file, []).model_dump()


def test_existing_file_is_kept(tmp_path: Path) -> None:
    file = tmp_path / "twa.yaml"
    file.write_text("mine")
    refused = CliRunner().invoke(app, ["init", str(file)])
    assert "--overwrite" in str(refused.exception)
    assert file.read_text() == "mine"
    CliRunner().invoke(app, ["init", str(file), "--overwrite"], catch_exceptions=False)
    assert load_config(file, []).steps == 100


def test_missing_folder(tmp_path: Path) -> None:
    refused = CliRunner().invoke(app, ["init", str(tmp_path / "absent" / "twa.yaml")])
    assert "cannot be written" in str(refused.exception)
