"""The framework of examples/proof: parts that run once, costs, confidence intervals, and tables."""

import argparse
import copy
import math
import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from examples.proof import run
from examples.proof.cost import Cost, measured
from examples.proof.detection.task import Detection
from examples.proof.extrapolated import bema, extra_merge
from examples.proof.images.clothes import Clothes
from examples.proof.images.network import shifted
from examples.proof.images.task import Images
from examples.proof.language.task import Language
from examples.proof.language.texts import PIECE, write_texts
from examples.proof.packages import members
from examples.proof.page import PAGE, updated
from examples.proof.parts import Part, Row, Rows, check_rows, run_parts, slug
from examples.proof.significance import difference
from examples.proof.soup.sentences import joined, spread, write_halves
from examples.proof.soup.task import Soup
from examples.proof.stored_rows import keep, kept_rows
from examples.proof.table import tables
from examples.proof.trial_optimizers import in_place_of_adamw
from examples.proof.trunk import Trunk
from examples.proof.trunk_methods import branch, selection
from examples.proof.trunk_work import TrunkWork
from examples.proof.vit.task import Vit
from examples.proof.work import read_settings
from examples.shared_directory import make_once
from examples.soup.finetune import random_batches
from examples.training import Training
from twa_scale import RunningAverages
from twa_scale.candidates.steps import chosen
from twa_scale.config.select import SelectConfig
from twa_scale.run.tasks.task import stack

PROOF = Path(__file__).resolve().parents[2] / "examples/proof"
TRUNKS = ["language", "images", "vit", "detection"]


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
    with measured(model, batch_size=4) as cost:
        model(torch.ones(4, 2)).sum().backward()
        with torch.no_grad():
            model(torch.ones(6, 2))
            inner(torch.ones(4, 2))
    model(torch.ones(4, 2))
    assert (cost.steps, cost.evaluations) == (1.0, 1.5)
    assert cost + Cost(1, 2, 3) == Cost(2, 3.5, cost.seconds + 3)


def test_the_interval_of_a_paired_difference() -> None:
    actual = difference([2.0, 3.0, 4.0], [1.0, 1.0, 1.0])
    assert actual.mean == 2 and math.isclose(actual.half, 4.303 / math.sqrt(3))
    assert actual.verdict(False) == "no difference shown"
    less = difference([0.1, 0.2, 0.3], [5.1, 5.2, 5.4])
    more = difference([5.1, 5.2, 5.4], [0.1, 0.2, 0.3])
    assert [less.verdict(False), more.verdict(False)] == ["lower", "**higher**"]
    assert [less.verdict(True), more.verdict(True)] == ["**lower**", "higher"]
    single = difference([1.0], [2.0])
    assert single.verdict(False) == "one seed: no interval" and single.shown(1.0, 4) == "-1.0000"
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


def test_a_finished_seed_is_kept_in_one_file_from_which_the_tables_can_be_made(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"seeds": [0, 1], "before": ["trunk"], "methods": {"EMA": {}}}
    settings |= {"tables": [{"reference": "EMA"}], "claims": []}
    rows = Rows(tmp_path / "seed-0")
    rows["trunk"] = {"seconds": 100.0, "settings": {"lr": 1, "steps": 2}}
    rows["EMA"] = {"steps": 60.0, "evaluations": 9.0, "seconds": 10.0, "settings": {}}
    rows["test/EMA"] = {"loss": 1.5, "settings": {}}
    parts = [Part("trunk", {"steps": 2, "lr": 1}, dict), Part("EMA", {}, dict), Part("test/EMA", {}, dict)]
    keep(tmp_path / "kept.json", parts, rows)
    kept = {0: kept_rows(tmp_path / "kept.json", parts), 1: kept_rows(tmp_path / "none.json", parts)}
    assert tables(tmp_path / "elsewhere", settings, kept=kept) == tables(tmp_path, settings)
    assert "| EMA | 60 | 9 | 10.0 % | 1.5000 |" in tables(tmp_path / "elsewhere", settings, kept=kept)
    with pytest.raises(SystemExit, match=r"kept.json: trunk was made with other settings"):
        kept_rows(tmp_path / "kept.json", [Part("trunk", {"steps": 2, "lr": 3}, dict)])


@pytest.mark.parametrize(("task", "size"), [*product(run.TASKS, ["full", "trials"]), *product(TRUNKS, ["oracle"])])
def test_the_page_has_the_tables_of_the_rows_that_are_kept(task: str, size: str, tmp_path: Path) -> None:
    """The rows must have been measured with the present settings."""
    asked = argparse.Namespace(size=size, device="cpu", out=tmp_path, seeds=[], packages=tmp_path, sentences=None)
    one = run.comparison(task, asked)
    written = tables(one.out, one.settings, one.shown, one.kept())
    assert (f"Finished seeds: {one.shown[0]}" in written) == (PROOF / "results" / one.name).is_dir()
    assert f"<!-- tables of {one.name} -->\n\n{written}\n<!-- end of {one.name} -->" in PAGE.read_text()


@pytest.mark.parametrize(("task", "size"), [*product(run.TASKS, ["trials"]), *product(TRUNKS, ["oracle"])])
def test_trials_of_settings_are_made_on_other_seeds_from_the_same_runs(task: str, size: str, tmp_path: Path) -> None:
    asked = argparse.Namespace(size=size, device="cpu", out=tmp_path, seeds=None, packages=tmp_path, sentences=None)
    trials, final = (
        run.comparison(task, asked),
        run.comparison(task, argparse.Namespace(**vars(asked) | {"size": "full"})),
    )
    assert min(trials.seeds) >= 100 and trials.shown == trials.seeds and not trials.others
    work = trials.work(100)
    assert not any(part.name.startswith("test/") for part in work.parts())
    assert trials.settings["tables"][0]["reference"] in trials.settings["methods"]
    if isinstance(work, TrunkWork):
        assert {**work.recorded_before, "tails": None} == {**final.work(100).recorded_before, "tails": None}
    if isinstance(work, TrunkWork):
        twa = {name: one for name, one in trials.settings["methods"].items() if one["how"] == "twa"}
        assert twa and all(work.config(name, one).evaluate_split == "validation" for name, one in twa.items())


def test_two_steps_of_sharpness_aware_minimization_are_an_update_with_the_gradient_at_the_other_point() -> None:
    start, first, second = torch.tensor([[1.0], [2.0]]), torch.tensor([[3.0], [4.0]]), torch.tensor([[-1.0], [0.5]])
    x, expected = (nn.Parameter(start.clone()) for _ in range(2))
    with in_place_of_adamw("sharpness-aware", {"radius": 0.5}):
        optimizer = torch.optim.AdamW([x], lr=0.1)
    for _ in range(2):
        x.grad = first.clone()
        optimizer.step()
        assert torch.allclose(x, expected + torch.tensor([[0.3], [0.4]]))
        x.grad, expected.grad = second.clone(), second.clone()
        optimizer.step()
        if expected.equal(start):
            plain = torch.optim.AdamW([expected], lr=0.1)
        plain.step()
        assert torch.allclose(x, expected)


def test_a_step_of_a_part_of_the_candidates_leaves_the_others_and_their_moments() -> None:
    torch.manual_seed(0)
    x = nn.Parameter(torch.zeros(8, 2))
    with in_place_of_adamw("part of the candidates", {"fraction": 0.25}):
        optimizer = torch.optim.AdamW([x], lr=0.1)
    assert type(torch.optim.AdamW([x])) is torch.optim.AdamW
    seen = set()
    for _ in range(20):
        before, moments = x.detach().clone(), optimizer.state[x].get("exp_avg", torch.zeros(8, 2)).clone()
        x.grad = torch.ones(8, 2)
        optimizer.step()
        moved = (x != before).all(1)
        assert moved.sum() == 2 and torch.equal(moved, (optimizer.state[x]["exp_avg"] != moments).all(1))
        seen.update(moved.nonzero().flatten().tolist())
    assert seen == set(range(8))


def test_optimizers_of_trials_say_what_they_cannot_train() -> None:
    x, rows = (nn.Parameter(torch.zeros(2, 1)) for _ in range(2))
    with in_place_of_adamw("sharpness-aware", {"radius": 0.5}):
        optimizer = torch.optim.AdamW([{"params": [x]}, {"params": [rows]}])
        alone = torch.optim.AdamW([x])
    with pytest.raises(ValueError, match="not for groups"):
        optimizer.step()
    x.grad = torch.zeros_like(x)
    alone.step()
    assert x.isfinite().all()


def test_tables_of_development_seeds_have_validation_losses(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"seeds": [0], "before": ["trunk"], "methods": {"EMA": {}, "TWA": {}}}
    settings |= {"tables": [{"reference": "EMA"}], "claims": [["TWA", "EMA"]]}
    rows = Rows(tmp_path / "seed-100")
    rows["trunk"] = {"seconds": 100.0}
    for name, loss in (("EMA", 1.5), ("TWA", 1.25)):
        rows[name] = {"steps": 60.0, "evaluations": 9.0, "seconds": 10.0, "validation": {"loss": loss}}
    written = tables(tmp_path, settings, [100])
    assert "| TWA | 60 | 9 | 10.0 % | 1.2500 | -0.2500 |" in written
    assert "validation loss" in written and "difference in validation loss" in written and "test" not in written


def test_tables_replace_those_of_the_page() -> None:
    page = "a\n<!-- tables of x -->\nold\n<!-- end of x -->\nb\n"
    once = updated(page, "x", "| new |\n")
    assert "old" not in once and once.startswith("a\n") and once.endswith("b\n") and "| new |" in once
    assert updated(once, "x", "| new |\n") == once
    with pytest.raises(SystemExit, match="tables of y"):
        updated(page, "y", "")


@pytest.mark.parametrize("size", ["full", "small", "tiny"])
@pytest.mark.parametrize("task", [Language, Detection])
def test_methods_start_from_earlier_results(task: type[Language | Detection], size: str, tmp_path: Path) -> None:
    settings = task.read(size)
    work = task(tmp_path, 0, settings, tmp_path)
    rows_of_a_method = 1 if size == "small" else 2
    num_parts = 1 + rows_of_a_method * len(settings["methods"])
    assert len({part.name for part in work.parts()}) == len(work.parts()) == num_parts
    before: list[str] = []
    for name, method in settings["methods"].items():
        assert method.get("start", "last") in ["last", *before], name
        if method["how"] == "twa":
            config = work.config(name, method)
            assert config.evaluate_split == "validation" and config.split == "train", name
            assert Path(config.output).name == slug(name)
            assert config.start == config.keep == "best", name
        if method["how"] == "decayed":
            assert branch(settings["trunk"]["steps"], method["steps"]) in work.trunk.settings["branches"]
        before.append(name)
    assert all(name in before for claim in settings["claims"] for name in claim)


@pytest.mark.parametrize("size", ["full", "small", "tiny"])
@pytest.mark.parametrize("task", [Images, Vit])
def test_image_methods_start_from_earlier_methods(task: type[Images], size: str, tmp_path: Path) -> None:
    settings = task.read(size)
    work = task(tmp_path, 0, settings, tmp_path)
    trunk, full = settings["trunk"], settings["full"]
    assert trunk["candidates"] * trunk["every"] <= trunk["steps"] == int(task.kind.constant * full)
    assert settings["tails"]["candidates"] * settings["tails"]["every"] <= full - 3 * full // 4
    before: list[str] = []
    for name, method in settings["methods"].items():
        assert method.get("start", "last") in ["last", *before], name
        if method["how"] == "schedule":
            first = task.kind.leaves(trunk["steps"], method["steps"])
            assert first in (*work.trunk.settings["branches"], trunk["steps"])
            assert task.kind.schedule((first - 1) / (trunk["steps"] + method["steps"])) == 1.0
        if method["how"] == "twa":
            assert work.config(name, method).candidates == work.candidates(method)
        most = settings["tails" if "tail" in method else "trunk"]["candidates"]
        assert all(n <= most for n in method.get("last", [])), name
        before.append(name)
    assert settings["methods"]["full run"]["steps"] == full - trunk["steps"]
    assert task.kind.schedule(1 - 1 / full) < 0.05
    assert all(name in before for claim in settings["claims"] for name in claim[:2])
    assert all(name in before for table in settings["tables"] for name in [*table["methods"], table["reference"]])


def test_shifted_images_are_windows_of_the_padded_ones() -> None:
    torch.manual_seed(0)
    images = torch.rand(64, 1, 4, 5)
    actual = set()
    for before, after in zip(images, shifted(images, 1), strict=True):
        padded = nn.functional.pad(before, (1, 1, 1, 1))
        windows = {
            (down, right, flip): padded[:, down : down + 4, right : right + 5].flip([-1] if flip else [])
            for down, right, flip in product(range(3), range(3), [True, False])
        }
        (key,) = [key for key, window in windows.items() if torch.equal(window, after)]
        actual.add(key)
    assert len(actual) > 9


def test_images_are_augmented_only_in_training(tmp_path: Path) -> None:
    images = torch.randint(256, (6, 1, 28, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    np.savez(tmp_path / "train.npz", images=images.numpy(), labels=torch.arange(6).numpy())
    task = Clothes({"train": str(tmp_path / "train.npz")}, {"width": 4, "blocks": 1})
    model, batch = task.model(), stack([task.dataset("train")[i] for i in range(6)])
    seen: list[torch.Tensor] = []
    model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    for mode in (True, False):
        task.loss(model.train(mode), batch).backward()
    task.metrics(model, batch)
    assert not torch.equal(seen[0], seen[1]) and torch.equal(seen[1], seen[2])
    assert torch.allclose(seen[1] * 0.353 + 0.286, images / 255, atol=1e-6)


def test_bema_of_candidates_is_that_of_running_averages_with_the_same_frequency() -> None:
    weights, every = torch.randn(7, 3, generator=torch.Generator().manual_seed(0)), 20
    model = nn.Linear(3, 1, bias=False)
    averages = RunningAverages(model, ema={"bema": {"bias_power": 0.4}, "update_every": every})
    for row in weights:
        for _ in range(every):
            model.weight.data.copy_(row)
            averages.step()
    with averages.weights("bema"):
        expected = model.weight.detach()[0].clone()
    assert torch.allclose(bema(len(weights), every, [0.4])["power 0.4"] @ weights, expected, atol=1e-5)


def test_extra_merge_extrapolates_from_two_means() -> None:
    positions = torch.arange(10.0)
    for name, length, multiple in (("0.5 past the last 2", 2, 0.5), ("1.0 past the last 5", 5, 1.0)):
        coefficients = extra_merge(10, [2, 5], [0.5, 1.0])[name]
        assert math.isclose(coefficients.sum(), 1, abs_tol=1e-6)
        last = positions[-length:].mean()
        assert torch.isclose(coefficients @ positions, last + multiple * length)


def test_a_margin_is_shown_when_the_whole_interval_is_within_it() -> None:
    own, remote = [0.90, 0.91, 0.92], [0.9001, 0.9101, 0.9201]
    actual = difference(own, remote)
    assert actual.verdict(True, 0.003) == "worse by less than the margin"
    assert actual.verdict(True, 0.00005) == "**margin not shown**"
    assert difference(remote, own).verdict(True, 0.00005) == "worse by less than the margin"
    assert difference([0.90, 0.95, 0.92], remote).verdict(True, 0.003) == "**margin not shown**"


def test_spreads_over_settings_are_compared_with_half_of_the_reference(tmp_path: Path) -> None:
    names = {method: [f"{method} {rate}" for rate in (1, 2)] for method in ("SWA", "TWA")}
    settings: dict[str, Any] = {"seeds": [0, 1], "before": [], "methods": {n: {} for of in names.values() for n in of}}
    settings |= {"tables": [{"reference": "SWA 1", "before": ["trunk"]}], "claims": [], "compared": "accuracy"}
    settings |= {"spreads": {"reference": "SWA", "methods": names}}
    for seed in settings["seeds"]:
        rows = Rows(tmp_path / f"seed-{seed}")
        rows["trunk"] = {"seconds": 100.0}
        for name, accuracy in {"SWA 1": 0.90, "SWA 2": 0.94, "TWA 1": 0.95, "TWA 2": 0.945}.items():
            rows[slug(name)] = {"steps": 1.0, "evaluations": 3.0, "seconds": 10.0}
            rows[f"test/{slug(name)}"] = {"loss": 1.0, "accuracy": accuracy + 0.01 * seed}
    written = tables(tmp_path, settings)
    assert "| TWA | 0.50 | -1.50 ± 0.00 | lower |" in written
    assert "| SWA | 4.00 | +2.00 ± 0.00 | **higher** |" in written


def test_accuracies_are_compared_in_percent_and_higher_is_better(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"seeds": [0, 1], "before": ["trunk"], "methods": {"EMA": {}, "TWA": {}}}
    settings |= {"tables": [{"reference": "EMA"}], "claims": [["TWA", "EMA"]], "compared": "accuracy"}
    for seed, better in enumerate([0.91, 0.912]):
        rows = Rows(tmp_path / f"seed-{seed}")
        rows["trunk"] = {"seconds": 100.0}
        for name, accuracy in (("EMA", 0.9), ("TWA", better)):
            rows[name] = {"steps": 60.0, "evaluations": 9.0, "seconds": 10.0}
            rows[f"test/{name}"] = {"loss": 1.0, "accuracy": accuracy}
    written = tables(tmp_path, settings)
    interval = 12.706 * 0.1
    assert f"| TWA | 60 | 9 | 10.0 % | 1.0000 | 91.10 | +1.10 ± {interval:.2f} |" in written
    assert f"| TWA | EMA | +1.10 ± {interval:.2f} | no difference shown |" in written


def test_cost_of_a_soup_includes_evaluations_of_its_candidates(tmp_path: Path) -> None:
    work = Soup(tmp_path, 0, Soup.read("tiny"), None)
    for name, loss in (("fine-tuning-00", 0.2), ("fine-tuning-01", 0.3), ("fine-tuning-02", 0.1)):
        work.rows[name] = {"seconds": 9.0, "evaluation": Cost(0, 5, 1).row(), "validation": {"loss": loss}}
    assert work.pool(0) == ["fine-tuning-02", "fine-tuning-00", "fine-tuning-01"]
    assert work.pool(1) == ["fine-tuning-00", "fine-tuning-01"]
    own = Cost(1, 2, 3)
    for how, without, evaluations in (("best", 0, 15), ("greedy", 1, 10), ("uniform", 0, 0), ("twa", 0, 0)):
        assert work.cost({"how": how, "without": without}, own) == own + Cost(0, evaluations, evaluations / 5), how


def test_halves_of_the_validation_sentences_are_disjoint(tmp_path: Path) -> None:
    rows = [f'positive,"sentence {i}, with a comma"' for i in range(5)]
    (tmp_path / "all.csv").write_text("\n".join(["label,text", *rows]) + "\n")
    halves = [path.read_text().splitlines() for path in write_halves(tmp_path / "all.csv", tmp_path / "halves")]
    assert halves == [["label,text", *rows[0::2]], ["label,text", *rows[1::2]]]
    both = joined(*write_halves(tmp_path / "all.csv", tmp_path / "halves"))
    assert both.splitlines() == ["label,text", *rows[0::2], *rows[1::2]]
    assert spread(tmp_path / "all.csv", 2).splitlines() == ["label,text", rows[0], rows[2]]


def test_batches_of_fine_tunings_have_sentences_of_similar_length_in_a_random_order() -> None:
    counts = torch.randint(5, 33, (640,), generator=torch.Generator().manual_seed(0))
    made = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        made.append(random_batches(counts, 16, 45))
    assert all(torch.equal(a, b) for a, b in zip(made[0], made[1], strict=True))
    assert not torch.equal(torch.cat(made[0]), torch.cat(made[2]))
    epoch = torch.cat(made[0][:40])
    assert len(made[0]) == 45 and torch.equal(epoch.sort()[0], torch.arange(640))
    padded = sum(16 * int(counts[batch].max()) for batch in made[0][:40])
    assert counts.sum() <= padded < 1.12 * counts.sum()
    lengths = torch.tensor([counts[batch].float().mean() for batch in made[0][:40]])
    assert 0 < int((lengths.diff() > 0).sum()) < 39  # not sorted by length


def test_development_seeds_never_read_the_test_split(tmp_path: Path) -> None:
    parts = Language(tmp_path, 100, Language.read("full"), tmp_path).parts()
    assert parts and not any(part.name.startswith("test/") for part in parts)


@pytest.mark.parametrize("task", run.TASKS)
def test_no_seed_of_the_small_size_reads_the_test_split(task: str) -> None:
    assert read_settings(PROOF / task / "methods.yaml", "small")["seeds"] == []
    assert read_settings(PROOF / task / "methods.yaml", "full")["seeds"] == [0, 1, 2, 3, 4]


def change_batch_size(settings: dict[str, Any]) -> None:
    settings["batch_size"] = 16


def change_config(settings: dict[str, Any]) -> None:
    settings["config.yaml"]["optimizer"]["lr"] = 0.1


def change_start(settings: dict[str, Any]) -> None:
    settings["methods"]["TWA"]["settings"] = ["store=packed8"]


def add_decayed_run(settings: dict[str, Any]) -> None:
    settings["methods"]["another"] = {"how": "decayed", "steps": 1000}


@pytest.mark.parametrize(
    ("change", "name", "message"),
    [
        (change_batch_size, "EMA", "{'batch_size': 32}; they are now {'batch_size': 16}"),
        (change_batch_size, "test/EMA", "{'batch_size': 32}; they are now {'batch_size': 16}"),
        (change_config, "TWA", "{'config.yaml.optimizer.lr': 0.03}; they are now"),
        (change_start, "TWA+anneal-60", "{}; they are now {'method.start.settings': ['store=packed8']}"),
        (change_start, "test/TWA+anneal-60", "method.start.settings"),
        (change_batch_size, "trunk", "batch_size"),
        (add_decayed_run, "trunk", "trunk.branches"),
    ],
)
def test_a_row_of_other_settings_is_refused(
    change: Callable[[dict[str, Any]], None], name: str, message: str, tmp_path: Path
) -> None:
    before, current = Language.read("full"), Language.read("full")
    work = Language(tmp_path, 0, before, tmp_path)
    (made,) = (item for item in work.parts() if item.name == name)
    work.rows[name] = {"settings": made.settings}
    check_rows(work.parts(), work.rows)
    change(current)
    with pytest.raises(SystemExit, match=f"{re.escape(name)}.json has the settings.*{re.escape(message)}"):
        check_rows(Language(tmp_path, 0, current, tmp_path).parts(), work.rows)


def test_the_trunk_does_not_depend_on_the_settings_of_methods(tmp_path: Path) -> None:
    settings = Language.read("full")
    trunk = Language(tmp_path, 100, settings, tmp_path).trunk.recorded
    current = copy.deepcopy(settings)
    change_config(current)
    change_start(current)
    assert Language(tmp_path, 100, current, tmp_path).trunk.recorded == trunk


@pytest.mark.parametrize(
    ("wrong", "options", "message"),
    [
        ("settings", ["--size=tiny", "--seeds", "0", "1"], "seed-1/EMA.json has the settings"),
        ("settings of a seed of the table", ["--size=tiny", "--seeds"], "seed-0/EMA.json has the settings"),
        ("packages", ["--seeds", "0"], "make proof"),
    ],
)
def test_errors_are_raised_before_the_work_begins(
    wrong: str, options: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if wrong != "packages":
        Rows(tmp_path / "language-tiny" / ("seed-1" if wrong == "settings" else "seed-0"))["EMA"] = {"settings": {}}
    there = set(tmp_path.rglob("*"))
    monkeypatch.setattr("sys.argv", ["run", "--task=language", f"--out={tmp_path}", f"--packages={tmp_path}", *options])
    with pytest.raises(SystemExit, match=message):
        run.main()
    assert set(tmp_path.rglob("*")) == there


def test_a_disk_that_is_too_full_is_refused(tmp_path: Path) -> None:
    run.check_space(tmp_path / "none/yet", 1)
    with pytest.raises(SystemExit, match=r"about 1000000000.0 GB are needed, and .* GB are free"):
        run.check_space(tmp_path / "none/yet", 10**18)


class Line(Training):
    """A training of one small layer."""

    def __init__(self, lr: float, end: int | None = None) -> None:
        torch.manual_seed(0)
        self.model, self.end, self.device = nn.Linear(2, 1), end, torch.device("cpu")
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=lr)

    def update(self, step: int, factor: float) -> float:
        if step == self.end:
            raise KeyboardInterrupt
        loss = self.model(torch.tensor([1.0, float(step)])).square().sum()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(loss)


def test_trunk_continues_only_from_a_state_with_its_settings(tmp_path: Path) -> None:
    settings = {"steps": 6, "candidates": 2, "every": 2, "ema": [0.5], "save_every": 2, "branches": [3]}

    def last(directory: Path, lr: float, end: int | None = None) -> dict[str, torch.Tensor]:
        training = Line(lr, end)
        Trunk(directory, settings, {"trunk": settings, "lr": lr}).run(training)
        return training.model.state_dict()

    with pytest.raises(KeyboardInterrupt):
        last(tmp_path / "a", 0.1, end=5)
    resumed, whole = last(tmp_path / "a", 0.1), last(tmp_path / "b", 0.1)
    assert all(torch.equal(resumed[key], whole[key]) for key in whole)
    other, recalibrated = last(tmp_path / "a", 0.2), last(tmp_path / "c", 0.2)
    assert all(
        torch.equal(other[key], recalibrated[key]) and not torch.equal(recalibrated[key], whole[key])
        for key in recalibrated
    )
    shutil.rmtree(tmp_path / "a/resume/6")
    with pytest.raises(SystemExit, match="resume/6 has no averages"):
        last(tmp_path / "a", 0.2)


def test_each_seed_has_another_shuffled_order() -> None:
    method = {"order": "shuffle"}
    orders = [chosen(range(40), SelectConfig(**selection(40, method, seed)), lambda _: None) for seed in (0, 1, 1)]
    assert orders[0] != orders[1] == orders[2]


def test_concurrent_callers_make_a_directory_once(tmp_path: Path) -> None:
    made: list[Path] = []

    def write(directory: Path) -> None:
        made.append(directory)
        directory.mkdir()
        time.sleep(0.05)
        (directory / "content").write_text(str(len(made)))

    def killed(directory: Path) -> None:
        write(directory)
        raise KeyboardInterrupt

    target = tmp_path / "new/target"
    with pytest.raises(KeyboardInterrupt):
        make_once(target, {"k": 1}, killed)
    assert not target.exists()
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: make_once(target, {"k": 1}, write), range(4)))
    assert len(made) == 2 and (target / "content").read_text() == "2"
    make_once(target, {"k": 2}, write)
    assert (target / "content").read_text() == "3"
    assert [path.name for path in target.parent.iterdir() if path.is_dir()] == ["target"]
    (target / "finished.json").unlink()
    with pytest.raises(SystemExit, match="target has files but no finished"):
        make_once(target, {"k": 2}, write)
    assert (target / "content").read_text() == "3"


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
    command = ["dpkg-deb", "--build", "--root-owner-group", str(root), str(tmp_path / "a_1_all.deb")]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env={**os.environ, "LC_ALL": "C"})
    assert list(members(tmp_path, "a")) == [("./usr/text", b"content")]
    with pytest.raises(SystemExit, match="make proof"):
        list(members(tmp_path, "b"))
