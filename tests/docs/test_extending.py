"""The changes that docs/extending.md shows, applied to a copy of the package and used."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.docs.blocks import ROOT, blocks_of

PROGRAM = """
import numpy, torch
import torch.distributed as dist
from torch import nn
from typer.testing import CliRunner

import twa_scale
from twa_scale.cli import app
from twa_scale.config import RunConfig
from twa_scale.engines.parameters import named_parameters
from twa_scale.ranks import World
from twa_scale.run.engines import run_engine

files = []
for i in range(4):
    torch.manual_seed(i)
    files.append(f"{i}.npz")
    numpy.savez(files[-1], **{name: value.numpy() for name, value in nn.Linear(6, 5).state_dict().items()})

model = nn.Linear(6, 5)
twa = twa_scale.attach(model, files, {"basis": "increments", "groups": "tensor", "kernels": "torch"})
expected = torch.stack([torch.from_numpy(numpy.load(file)["weight"]) for file in files]).mean(0)
torch.testing.assert_close(model.weight.detach(), expected)
assert twa.state_dict()["x"].shape == (3, 2)  # n - 1 steps, two groups
model(torch.ones(2, 6)).square().mean().backward()
twa.step()
torch.testing.assert_close(twa.coefficients.sum(0), torch.ones(2).double())  # steps between candidates keep the sum
assert (twa.coefficients - 0.25).abs().max() > 1e-3

said = CliRunner().invoke(app, ["names", files[0]], catch_exceptions=False).output
assert said.split("\\n")[:2] == ["bias (5,)", "weight (5, 6)"], said

run = dict(candidates="x", output="y", task={"name": "causal_lm"}, steps=1)
views = run_engine(RunConfig(engine="ddp_views", **run), World(0, 2, 0))
plain = run_engine(RunConfig(engine="ddp", **run), World(0, 2, 0))
_, parameters = named_parameters(model)
half, whole = (sum(engine.transient_bytes(model, parameters).values()) for engine in (views, plain))
assert 2 * half == whole
dist.init_process_group("gloo", init_method="file://" + __file__ + ".store", rank=0, world_size=1)
class Task:
    model = staticmethod(lambda: nn.Linear(6, 5))
assert views.build(Task(), World(0, 1, 0), torch.device("cpu")).gradient_as_bucket_view
"""


def apply(diff: str, root: Path) -> None:
    """Apply the hunks of a diff: the lines that stay or go are found by their text, which has to be there once."""
    file = root
    for hunk in diff.split("@@\n"):
        lines = [line for line in hunk.splitlines() if not line.startswith(("--- ", "+++ "))]
        if lines:
            text = file.read_text() if file.exists() else ""
            before, after = ("".join(f"{line[1:]}\n" for line in lines if line[:1] != side) for side in "+-")
            assert not text if not before else text.count(before) == 1, f"{file}:\n{before}"
            file.write_text(text.replace(before, after) if before else after)
        if "+++ b/" in hunk:
            file = root / hunk.rpartition("+++ b/")[2].strip()


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("extended")
    shutil.copytree(ROOT / "twa_scale", root / "twa_scale", ignore=shutil.ignore_patterns("__pycache__"))
    diffs = [block.text for block in blocks_of(ROOT / "docs" / "extending.md") if block.language == "diff"]
    assert len(diffs) == 4
    for diff in diffs:
        apply(diff, root)
    return root


def test_the_examples_work(copy: Path) -> None:
    program = copy / "program.py"
    program.write_text(PROGRAM)
    environment = {"PYTHONPATH": str(copy), "PATH": "", "HOME": str(copy)}
    subprocess.run([sys.executable, str(program)], cwd=copy, env=environment, check=True, timeout=300)
