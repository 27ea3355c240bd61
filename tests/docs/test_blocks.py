"""Every block of Python, shell and YAML in README, CONTRIBUTING and docs runs, or a comment gives the reason."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
import typer.main
from typer.testing import CliRunner

from tests.docs import block_inputs
from tests.docs.blocks import PAGES, ROOT, Block, blocks_of, commands_of
from twa_scale.cli import app
from twa_scale.config import load_config

BLOCKS = [block for page in PAGES for block in blocks_of(page)]
CHECKED = ("python", "sh", "yaml")
RUN = sorted({block.page for block in BLOCKS if block.language in CHECKED and block.kind not in ("not run", "run by")})
PATHS = re.compile(r"(?:launch|examples|configs|tests|docs)/[\w./-]+\.\w+")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Return an empty working directory with the candidates, from which Python can import."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    block_inputs.write_candidates(tmp_path / "runs/a")
    for name in ("configs", "launch"):
        (tmp_path / name).symlink_to(ROOT / name)
    yield tmp_path
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.mark.parametrize("page", RUN, ids=lambda page: str(page.relative_to(ROOT)))
def test_blocks_of_a_page_run(page: Path, folder: Path) -> None:
    names = block_inputs.names()
    for block in blocks_of(page):
        if block.language not in CHECKED or block.kind in ("not run", "run by"):
            continue
        if block.kind == "file":
            (folder / block.detail).write_text(block.text)
        elif block.language == "python":
            run_python(block, names, folder)
        elif block.language == "sh":
            for command in commands_of(block):
                run_command(block, command)
        if block.language == "yaml":
            read_config(block, folder)


def run_python(block: Block, names: dict[str, Any], folder: Path) -> None:
    if "fully_shard" in block.text and not dist.is_initialized():
        dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=0, world_size=1)
    if hasattr(names.get("twa"), "close"):
        names.pop("twa").close()
    names["model"] = block_inputs.Model()
    if block.kind == "run":
        exec(block.detail, names)
    exec(compile("\n" * block.line + block.text, str(block.page), "exec"), names)


def run_command(block: Block, command: str) -> None:
    words = shlex.split(command)
    assert words[0] == "twa-scale", f"{block.where}: {command!r} cannot run here; say why in a comment above the block"
    result = CliRunner().invoke(app, words[1:])
    assert result.exit_code == 0, f"{block.where}: {command}\n{result.output}\n{result.exception!r}"


def read_config(block: Block, folder: Path) -> None:
    path = folder / "read.yaml"
    path.write_text(block.text)
    load_config(path, [])


@pytest.mark.parametrize(
    "block", [block for block in BLOCKS if block.kind == "not run" and block.language == "sh"], ids=lambda b: b.where
)
def test_a_command_that_is_not_run_parses(block: Block) -> None:
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for line in commands_of(block):
        words = shlex.split(line)
        if words[0] == "twa-scale":
            commands[words[1]].make_context(words[1], words[2:])
        if words[0] == "make":
            assert [word for word in words[1:] if "=" not in word and word not in targets] == [], block.where
        for path in PATHS.findall(line):
            assert (ROOT / path).exists(), f"{block.where}: {path}"


def test_a_block_that_another_test_runs_names_that_test() -> None:
    for block in BLOCKS:
        if block.kind == "run by":
            path = ROOT / block.detail
            assert path.exists(), block.where
            assert block.page.name in path.read_text(), f"{block.where}: {block.detail} does not read this page"


def test_every_reason_is_a_sentence_about_files_that_exist() -> None:
    for block in BLOCKS:
        if block.kind == "not run":
            assert len(block.detail.split()) >= 3, block.where
            assert [path for path in PATHS.findall(block.detail) if not (ROOT / path).exists()] == [], block.where
