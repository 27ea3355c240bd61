"""What the command of the proof refuses before it works."""

import sys
from pathlib import Path

import pytest

from examples.proof.run import main
from examples.proof.soup.task import Soup
from examples.proof.work import recipe_settings
from twa_scale.errors import ConfigError


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--size small --page", "--page: proof.md has no tables of --size small --device cpu"),
        ("--size tiny --page", "--page: proof.md has no tables of --size tiny --device cpu"),
        ("--size large --task vit", "vit has no size large; it has full, trials, oracle, small, tiny. --task"),
        ("--page --seeds 0 100", "--page: language: proof.md has the seeds 0, 1, 2, 3, 4, not 100; give some of these"),
        ("--size trials --seeds 0", "language-trials: the final seeds 0 are for the final methods alone; give some of"),
        ("--size oracle --seeds 1", "language-oracle: the final seeds 1 are for the final methods alone; give some of"),
        ("--size trials --page --seeds 7", "--page: language-trials: proof.md has the seeds 100, 101, 102, not 7"),
    ],
)
def test_seeds_and_sizes_that_do_not_fit(
    words: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["run.py", "--task", "language", "--out", str(tmp_path / "out"), *words.split()])
    with pytest.raises(SystemExit):
        main()
    assert message in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_unknown_recipes_are_refused() -> None:
    with pytest.raises(ConfigError, match="recipe: tale is unknown; it is one of tail, head, soup"):
        recipe_settings("tale")


def test_a_method_of_the_first_pool_has_one_row_and_one_claim() -> None:
    settings = Soup.read("full")
    assert [name for name in settings["methods"] if name.startswith("longer")] == ["longer fine-tuning, all"]
    assert [pair for pair in settings["claims"] if "longer" in pair[1]] == [
        ["TWA tensor, all", "longer fine-tuning, all"]
    ]
    methods, pools = settings["tables"][0]["methods"], settings["tables"]
    assert [len(table["methods"]) for table in pools] == [len(methods), *[len(methods) - 1] * 3]
    assert Soup.read("tiny")["methods"]["longer fine-tuning, without the best 1"]["steps"] == 1
