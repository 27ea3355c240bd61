"""`recipe`: named settings, which explicit settings override."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import yaml
from typer.testing import CliRunner

import twa_scale
from twa_scale import ConfigError, RunConfig, TwaConfig
from twa_scale.cli import app
from twa_scale.config import OptimizerConfig, RecipeName, load_config, recipe_line, validated
from twa_scale.config.optimizers import RATES
from twa_scale.config.recipes import RECIPES, settings_of_recipe
from twa_scale.run.batches import Batches
from twa_scale.run.comparison import caveat

MINIMAL = {"candidates": "a/*", "task": {"name": "causal_lm"}, "output": "out"}
PAGE = Path(__file__).parents[2] / "docs/how-to/settings.md"


def made(**settings: Any) -> RunConfig:
    return RunConfig(**{**MINIMAL, **settings})


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_complete(name: str) -> None:
    """All values are used and valid. The rate is the one around which `lr: auto` tries others, which `soup` refuses."""
    config = made(recipe=name)
    for key, value in RECIPES[name].items():
        actual = getattr(config, key)
        assert (actual == value) if not isinstance(value, dict) else value.items() <= actual.model_dump().items()
    assert config.lr == (0.03 if name == "soup" else RATES[config.optimizer.name, config.units])
    assert name in get_args(RecipeName) and len(RECIPES) == len(get_args(RecipeName))
    assert f"recipe {name}: basis {config.basis}, " in recipe_line(config)
    assert RunConfig(**config.model_dump()) == config


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"groups": "tensor"}, {"groups": "tensor", "row_lr": 0.001, "steps": 60}),
        ({"optimizer": {"lr": 0.1}}, {"lr": 0.1, "row_lr": 0.01, "optimizer.name": "adamw"}),
        ({"optimizer": OptimizerConfig(lr=0.1)}, {"lr": 0.1}),
        ({"optimizer": {"lr": "auto"}}, {"lr": 0.01, "optimizer.lr": "auto"}),
        ({"epochs": 2}, {"steps": None, "epochs": 2}),
        ({"steps": None}, {"steps": 60}),
        ({"basis": "simplex"}, {"groups": "global"}),  # corrections of rows do not apply
        ({"basis": "pca"}, {"groups": "global"}),
        ({"basis": "normalized"}, {"groups": "tensor+row"}),
        ({"start": "last", "keep": "last"}, {"start": "last", "keep": "last"}),
        ({"schedule": {"warmup": 0.5}}, {"schedule.warmup": 0.5, "schedule.name": "cosine"}),
        ({"recipe": "head", "steps": 5}, {"steps": 5, "epochs": None}),
        ({"recipe": "head", "optimizer": {"name": "sgd", "lr": 2.0, "momentum": 0.9}, "units": "weight"}, {"lr": 2.0}),
        ({"recipe": "head", "schedule": {"name": "constant"}}, {"schedule.warmup": 0.2, "groups": "tensor+row"}),
        ({"units": "weight", "optimizer": {"lr": 0.01}}, {"lr": 0.01}),
        ({"recipe": "soup", "split": "train"}, {"split": "train", "epochs": 3.0}),
    ],
)
def test_given_settings_are_kept(options: dict[str, Any], expected: dict[str, Any]) -> None:
    config = made(**{"recipe": "tail", **options})
    for key, value in expected.items():
        section, _, name = key.rpartition(".")
        assert getattr(getattr(config, section) if section else config, name, None) == value, key


def test_without_a_recipe_nothing_changes() -> None:
    assert made(steps=1).model_fields_set == {*MINIMAL, "steps"} and recipe_line(made(steps=1)) == ""


def test_settings_of_another_optimizer_are_not_those_of_the_recipe() -> None:
    config = made(recipe="tail", optimizer={"name": "sgd", "lr": 0.01})
    assert "optimizer.lr" not in settings_of_recipe(config) and "groups" in settings_of_recipe(config)


def test_attach_ignores_run_settings_of_recipes() -> None:
    config = validated(TwaConfig, {"recipe": "tail"})
    assert config.groups == "tensor+row" and config.start == "center"  # `best` needs evaluations


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"recipe": "tale"}, "recipe: .*'tail', 'head' or 'soup'"),
        ({"recipe": ["tail"]}, "recipe: "),
        ({"recipe": "tail", "optimizer": 3}, "optimizer: "),
        ({"recipe": "tail", "groups": None, "schedule": None}, "groups: .*schedule: "),
        ({"recipe": "tail", "groups": "tensor+row", "basis": "simplex"}, "basis is 'simplex'.*those of recipe 'tail'"),
        ({"recipe": "tail", "units": "weight"}, "recipe 'tail' has no learning rate for adamw with units weight"),
        ({"recipe": "tail", "optimizer": {"name": "sgd"}}, "'tail' has no learning rate for sgd with units delta"),
        ({"recipe": "tail", "optimizer": {"name": "adam"}}, "'tail' has no learning rate for adam with units delta"),
        (
            {"recipe": "tail", "optimizer": {"name": "sgd"}, "units": "weight"},
            "'tail' has no learning rate for sgd with units weight",
        ),
        ({"recipe": "soup", "optimizer": {"lr": "auto"}}, "held-out.*another `split`.*those of recipe 'soup'"),
    ],
)
def test_invalid_recipes_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        validated(RunConfig, {**MINIMAL, **settings})


def typed(*words: str) -> str:
    return CliRunner().invoke(app, words, catch_exceptions=False).output


@pytest.mark.parametrize("name", RECIPES)
def test_init_and_print_config(tmp_path: Path, name: str) -> None:
    """The file of `init` has the recipe's values as defaults. The printed configuration is the same."""
    file, printed = tmp_path / "twa.yaml", tmp_path / "printed.yaml"
    typed("init", str(file), "--recipe", name, "--output", str(tmp_path / "out"))
    config = load_config(file)
    assert (config.recipe, config.steps, config.epochs) == (name, *map(RECIPES[name].get, ("steps", "epochs")))
    keys = r"^# ((?:  )?[a-z_]+:( .*)?)$"
    displayed = yaml.safe_load(re.sub(keys, r"\1", file.read_text(), flags=re.MULTILINE))
    assert validated(RunConfig, displayed) == config
    printed.write_text(typed("run", str(file), "seed=3", "--print-config"))
    assert load_config(printed) == load_config(file, ["seed=3"])
    assert f"basis: {config.basis}  # recipe {name}\n" in printed.read_text() and "seed: 3\n" in printed.read_text()
    assert not (tmp_path / "out").exists()


def test_steps_of_init_override_the_recipe(tmp_path: Path) -> None:
    typed("init", str(tmp_path / "a.yaml"), "--recipe", "head", "--steps", "7")
    config = load_config(tmp_path / "a.yaml")
    assert config.steps == 7 and config.epochs is None and config.groups == "tensor+row"


def test_unknown_recipe_of_init(tmp_path: Path) -> None:
    with pytest.raises(twa_scale.ConfigError, match="recipe"):
        typed("init", str(tmp_path / "a.yaml"), "--recipe", "tale")
    assert not (tmp_path / "a.yaml").exists()


def test_documentation_has_the_values_of_the_recipes() -> None:
    text = PAGE.read_text()
    for name, recipe in RECIPES.items():
        for key, value in recipe.items():
            for first, wanted in value.items() if isinstance(value, dict) else [(key, value)]:
                cell = yaml.safe_dump(wanted, default_flow_style=True).replace("\n...", "").strip()
                full = f"{key}.{first}" if isinstance(value, dict) else first
                assert re.search(rf"\| `{re.escape(full)}` \|.*`{re.escape(cell)}`", text), (name, full, cell)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"keep": "best"}, "keep: best chooses .* give keep: last"),
        ({"keep": "last", "start": "best"}, "^start: best chooses by the test split"),
        ({"keep": "last", "optimizer": {"lr": "auto"}}, "^optimizer.lr: auto chooses by the test split"),
        ({"recipe": "tail", "steps": 1}, "^keep: best, start: best choose by the test split"),
    ],
)
def test_selection_by_the_test_split_is_reported(settings: dict[str, Any], words: str) -> None:
    assert re.search(words, caveat(made(**{"steps": 1, "evaluate_split": "test", **settings})) or "")
    assert caveat(made(**{"steps": 1, **settings})) is None


@pytest.mark.parametrize(
    ("limit", "every", "expected"),
    [(2, 1, range(24)), (None, 2, [*range(12), *range(24, 36), 48, 49]), (4, 3, [*range(12), *range(36, 48)])],
)
def test_evaluated_examples_do_not_depend_on_ranks_and_micro_batches(
    limit: int | None, every: int, expected: Iterable[int]
) -> None:
    for size, micro in ((1, 12), (1, 3), (2, 3), (4, 1)):
        seen = []
        for rank in range(size):
            examples: Any = [{"i": torch.tensor(i)} for i in range(50)]
            for batch, counts in Batches(examples, 12, micro, rank, size, 0).in_order(limit, every):
                seen += batch["i"].tolist() if counts else []
        assert sorted(seen) == list(expected), (size, micro)


class CountedExamples(list[dict[str, torch.Tensor]]):
    """Examples with given numbers of tokens."""

    token_counts = (3, 9, 1, 9, 5, 2, 8, 4)


def test_each_example_needs_its_number_of_tokens() -> None:
    examples = CountedExamples({"i": torch.tensor(count)} for count in (3, 9, 1))
    with pytest.raises(ConfigError, match="token_counts: the task has 8 counts for 3 examples"):
        next(Batches(examples, 2, 2, 0, 1, 0).in_order())


def test_evaluated_examples_of_similar_length_share_a_batch() -> None:
    def batches(rank: int, size: int, limit: int | None = None, every: int = 1) -> list[tuple[list[int], bool]]:
        examples = CountedExamples({"i": torch.tensor(count)} for count in CountedExamples.token_counts)
        made = Batches(examples, 2 * size, 2, rank, size, 0).in_order(limit, every)
        return [(batch["i"].tolist(), counts) for batch, counts in made]

    assert [batch for batch, _ in batches(0, 1)] == [[9, 9], [8, 5], [4, 3], [2, 1]]
    assert [batch for batch, _ in batches(0, 1, 2)] == [[9, 9], [3, 1]]  # of the first two batches in the given order
    assert [batch for batch, _ in batches(0, 1, every=2)] == [[9, 5], [3, 2]]
    assert [batches(rank, 3) for rank in range(3)] == [
        [([9, 9], True), ([2, 1], True)],
        [([8, 5], True), ([9], False)],
        [([4, 3], True), ([9], False)],
    ]
