"""The framework of examples/proof: parts that are run once, costs that are counted, intervals, tables."""

import math
import os
import shutil
import subprocess
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from examples.proof.cost import Cost, measured
from examples.proof.language.methods import branch
from examples.proof.language.task import Language
from examples.proof.language.texts import PIECE, members, write_texts
from examples.proof.page import updated
from examples.proof.parts import Part, Row, Rows, run_parts, slug
from examples.proof.significance import difference
from examples.proof.table import tables


def test_a_finished_part_is_never_run_again_and_a_killed_one_is(tmp_path: Path) -> None:
    calls: list[str] = []

    def works(name: str) -> Row:
        calls.append(name)
        return {"loss": 1.0}

    def killed() -> Row:
        calls.append("killed")
        raise KeyboardInterrupt

    rows = Rows(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        run_parts([Part("a", {}, lambda: works("a")), Part("test/b", {}, killed), Part("c", {}, killed)], rows)
    assert "a" in rows and "test/b" not in rows and "c" not in rows
    run_parts([Part(name, {"k": 1}, partial(works, name)) for name in ("test/b", "c")], Rows(tmp_path))
    run_parts([Part("a", {}, partial(works, "a"))], rows)
    assert calls == ["a", "killed", "test/b", "c"]
    assert rows["test/b"] == {"loss": 1.0, "settings": {"k": 1}}
    with pytest.raises(SystemExit, match=r"c.json has the settings \{'k': 1\}; they are now \{'k': 2\}"):
        run_parts([Part("d", {}, killed), Part("c", {"k": 2}, killed)], rows)


def test_every_forward_pass_is_counted_with_or_without_a_backward_pass() -> None:
    inner = nn.Linear(2, 2)
    model = nn.Sequential(inner, nn.Linear(2, 2))
    with measured(nn.Sequential, batch_size=4) as cost:
        model(torch.ones(4, 2)).sum().backward()
        with torch.no_grad():
            model(torch.ones(6, 2))
            inner(torch.ones(4, 2))
    model(torch.ones(4, 2))
    assert (cost.steps, cost.evaluations) == (1.0, 1.5)
    assert cost + Cost(1, 2, 3) == Cost(2, 3.5, cost.seconds + 3)


def test_the_interval_of_a_paired_difference() -> None:
    found = difference([2.0, 3.0, 4.0], [1.0, 1.0, 1.0])
    assert found.mean == 2 and math.isclose(found.half, 4.303 / math.sqrt(3))
    assert found.verdict == "no difference shown"
    assert difference([0.1, 0.2, 0.3], [5.1, 5.2, 5.4]).verdict == "lower"
    assert difference([5.1, 5.2, 5.4], [0.1, 0.2, 0.3]).verdict == "**higher**"
    alone = difference([1.0], [2.0])
    assert alone.verdict == "one seed: no interval" and str(alone) == "-1.0000"
    with pytest.raises(ValueError, match="argument 2 is shorter"):
        difference([1.0, 2.0], [1.0])


def test_tables_take_only_seeds_whose_parts_are_all_there(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"seeds": [0, 1, 2], "before": ["trunk"], "methods": {"EMA": {}, "TWA + x": {}}}
    settings |= {"tables": [{"reference": "EMA"}], "claims": [["TWA + x", "EMA"]]}
    for seed, (ema, twa) in enumerate([(1.5, 1.4), (1.7, 1.5), (9.0, 9.0)]):
        rows = Rows(tmp_path / f"seed-{seed}")
        rows["trunk"] = {"seconds": 100.0}
        for name, loss in (("EMA", ema), ("TWA + x", twa)):
            rows[slug(name)] = {"steps": 60.0, "evaluations": 9.0, "seconds": 10.0}
            if seed < 2 or name == "EMA":
                rows[f"test/{slug(name)}"] = {"loss": loss}
    written = tables(tmp_path, settings)
    assert "Finished seeds: 0, 1. Not finished: 2." in written
    assert "| EMA | 60 | 9 | 10.0 % | 1.6000 |  |" in written
    interval = 12.706 * 0.05
    assert f"| TWA + x | EMA | -0.1500 ± {interval:.4f} | no difference shown |" in written
    assert tables(tmp_path / "none", settings) == "No seed has finished yet.\n"


def test_tables_replace_those_of_the_page() -> None:
    page = "a\n<!-- tables of x -->\nold\n<!-- end of x -->\nb\n"
    once = updated(page, "x", "| new |\n")
    assert "old" not in once and once.startswith("a\n") and once.endswith("b\n") and "| new |" in once
    assert updated(once, "x", "| new |\n") == once
    with pytest.raises(SystemExit, match="tables of y"):
        updated(page, "y", "")


@pytest.mark.parametrize("size", ["full", "small", "tiny"])
def test_methods_can_be_made_from_what_is_there_before_them(size: str, tmp_path: Path) -> None:
    settings = Language.read(size)
    work = Language(tmp_path, settings["seeds"][0], settings, tmp_path)
    assert len({part.name for part in work.parts()}) == len(work.parts()) == 1 + 2 * len(settings["methods"])
    before: list[str] = []
    for name, method in settings["methods"].items():
        assert method.get("start", "last") in ["last", *before], name
        if method["how"] == "twa":
            config = work.config(name, method)
            assert config.evaluate_split == "validation" and config.split == "train", name
            assert Path(config.output).name == slug(name)
        if method["how"] == "decayed":
            assert branch(settings["trunk"]["steps"], method["steps"]) in work.trunk.settings["branches"]
        before.append(name)
    assert all(name in before for claim in settings["claims"] for name in claim)


def test_development_seeds_never_read_the_test_split(tmp_path: Path) -> None:
    parts = Language(tmp_path, 100, Language.read("full"), tmp_path).parts()
    assert parts and not any(part.name.startswith("test/") for part in parts)


def test_held_out_pieces_come_from_sources_that_training_does_not_see(tmp_path: Path) -> None:
    write_texts(tmp_path, ["python"], {"validation": 2, "test": 3}, tmp_path)
    train = (tmp_path / "train/python.txt").read_bytes()
    paths = [*(tmp_path / "validation").iterdir(), *(tmp_path / "test").iterdir()]
    pieces = [path.read_bytes() for path in paths]
    assert len(set(pieces)) == 5 and {len(piece) for piece in pieces} == {PIECE}
    assert len(train) > 1_000_000 and not any(piece in train for piece in pieces)


@pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="needs dpkg-deb")
def test_members_of_a_debian_package_are_read_without_installing_it(tmp_path: Path) -> None:
    root = tmp_path / "root"
    (root / "DEBIAN").mkdir(parents=True)
    (root / "DEBIAN/control").write_text(
        "Package: a\nVersion: 1\nArchitecture: all\nMaintainer: m <m@m>\nDescription: d\n"
    )
    (root / "usr").mkdir()
    (root / "usr/text").write_bytes(b"content")
    command = ["dpkg-deb", "--build", "--root-owner-group", root, tmp_path / "a_1_all.deb"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env={**os.environ, "LC_ALL": "C"})
    assert list(members(tmp_path, "a")) == [("./usr/text", b"content")]
    with pytest.raises(SystemExit, match="make proof"):
        list(members(tmp_path, "b"))
