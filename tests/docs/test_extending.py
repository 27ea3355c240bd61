"""The changes in docs/extending.md are applied to a copy of the package and used."""

import re
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
from twa_scale.config import RunConfig, TaskConfig
from twa_scale.config.kinds import STORES
from twa_scale.engines.parameters import named_parameters
from twa_scale.errors import TwaError
from twa_scale.ranks import World
from twa_scale.run.engines import run_engine
from twa_scale.run.tasks import Task, build_task, stack
from twa_scale.store import span_bytes

trained = {}
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

for store in ("disk32", "dense32"):
    other = nn.Linear(6, 5)
    held = twa_scale.attach(other, files, {"store": store, "groups": "tensor", "kernels": "torch"})
    mapped = "(deleted)" in open("/proc/self/maps").read()
    assert mapped == (store == "disk32"), store
    assert held.store_bytes == sum(span_bytes(store, 4, size) for size in (30, 5))
    other(torch.ones(2, 6)).square().mean().backward()
    held.step()
    trained[store] = other.weight.detach().clone(), held.coefficients
    held.close()
assert all(map(torch.equal, trained["disk32"], trained["dense32"]))
assert "disk32" in STORES

torch.save({"x": torch.eye(6), "y": torch.ones(6)}, "train.pt")
task = build_task(TaskConfig(name="regression", data=".", columns=6))
examples = task.dataset("train")
assert isinstance(task, Task) and len(examples) == 6
batch = stack([examples[i] for i in range(6)])
total, count = task.metrics(task.model(), batch)["loss"]
assert count == 6 and total > 0 and task.loss(task.model(), batch).requires_grad
for options, wrong in ((dict(columns=0), "columns"), (dict(colums=6), "colums")):
    try:
        build_task(TaskConfig(name="regression", data=".", **options))
    except TwaError as error:
        assert wrong in str(error)
    else:
        raise AssertionError(options)

run = dict(candidates="x", output="y", task={"name": "causal_lm"}, steps=1)
views = run_engine(RunConfig(engine="ddp_views", **run), World(0, 2, 0))
plain = run_engine(RunConfig(engine="ddp", **run), World(0, 2, 0))
_, parameters = named_parameters(model)
half, whole = (sum(engine.transient_bytes(model, parameters).values()) for engine in (views, plain))
assert 2 * half == whole
dist.init_process_group("gloo", init_method="file://" + __file__ + ".store", rank=0, world_size=1)
class Linear:
    model = staticmethod(lambda: nn.Linear(6, 5))
assert views.build(Linear(), World(0, 1, 0), torch.device("cpu")).gradient_as_bucket_view
"""


PAGE = ROOT / "docs" / "extending.md"


def diffs_of(page: Path) -> dict[str, str]:
    """Return the diff of each section that has one, by the anchor of its title."""
    lines, actual = page.read_text().splitlines(), {}
    for block in blocks_of(page):
        if block.language == "diff":
            title = next(line for line in reversed(lines[: block.line]) if line.startswith("## "))
            anchor = title.removeprefix("## ").lower().replace(" ", "-")
            assert anchor not in actual, f"{block.where}: one diff for each section"
            actual[anchor] = block.text
    return actual


DIFFS = diffs_of(PAGE)


def apply(diff: str, root: Path) -> None:
    """Apply the hunks of a diff. The text of context and removed lines must occur exactly once."""
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
    for diff in DIFFS.values():
        apply(diff, root)
    return root


def test_the_table_names_and_counts_the_files_of_each_example() -> None:
    """The table gives, for each section: "2: `config/kinds.py`, `average/bases.py` | 1, in `run/engines/`"."""
    row = re.compile(r"^\| \[.+?\]\(#(.+?)\) \| (\d+): (.+?) \| (\d+)(?:, in `(.+?)`)? \|", re.MULTILINE)
    rows = {anchor: rest for anchor, *rest in row.findall(PAGE.read_text())}
    assert rows.keys() == DIFFS.keys() and len(rows) == 6
    for anchor, (num_changed, changed, num_new, folder) in rows.items():
        pairs = re.findall(r"^--- (.+)\n\+\+\+ b/twa_scale/(.+)$", DIFFS[anchor], re.MULTILINE)
        old, new = ([path for before, path in pairs if (before == "/dev/null") == added] for added in (False, True))
        assert (int(num_changed), re.findall("`(.+?)`", changed)) == (len(old), old), anchor
        assert int(num_new) == len(new) and all(path.startswith(folder) for path in new), anchor


@pytest.mark.slow
def test_examples_of_the_page_work(copy: Path) -> None:
    program = copy / "program.py"
    program.write_text(PROGRAM)
    environment = {"PYTHONPATH": str(copy), "PATH": "", "HOME": str(copy)}
    subprocess.run([sys.executable, str(program)], cwd=copy, env=environment, check=True, timeout=300)
