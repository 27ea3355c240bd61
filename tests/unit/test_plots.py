"""Plots of every size are compared by their pixels, and do not change the state of matplotlib."""

from pathlib import Path

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.image import imread

from tests.grid import rest_slow
from twa_scale.errors import OutputError
from twa_scale.run.plots import DIVERGING, plot_cosines, plot_training

RECORDS = [
    {"step": 0, "validation/loss": 1.5, "validation/bits_per_byte": 2.2},
    *({"step": step, "loss": 1.6 - 0.01 * step, "lr": 0.1} for step in range(1, 30)),
    {"step": 30, "validation/loss": 1.4},
]


def share_of(picture: np.ndarray, color: tuple[float, ...]) -> float:
    return float((np.abs(picture[..., :3] - np.array(color[:3])).max(-1) < 0.02).mean())


@pytest.mark.parametrize(
    ("n", "groups"),
    rest_slow(
        [(1, 1), (2, 1), (10, 1), (3, 4), (10, 60), (40, 200), (256, 1), (256, 200)],
        lambda n, groups: (n, groups) in ((1, 1), (3, 4), (256, 200)),
    ),
)
def test_training_is_drawn_at_any_size(tmp_path: Path, n: int, groups: int) -> None:
    before = dict(mpl.rcParams)
    coefficients = np.random.default_rng(0).normal(1 / n, 0.2, (n, groups))
    labels = [f"runs/a/step-{i}" for i in range(n)]
    plot_training(tmp_path / "p.png", coefficients, labels, [f"blocks.{g}.weight" for g in range(groups)], RECORDS)
    height, width, _ = imread(tmp_path / "p.png").shape
    assert 400 < height < 4000 and 400 < width < 4000
    assert dict(mpl.rcParams) == before
    assert [path.name for path in tmp_path.iterdir()] == ["p.png"]


def test_color_shows_more_or_less_than_uniform(tmp_path: Path) -> None:
    values = np.full((4, 30), 0.25)
    values[1], values[2] = 0.75, -0.25
    plot_training(tmp_path / "p.png", values, list("abcd"), [str(g) for g in range(30)], [])
    picture = imread(tmp_path / "p.png")
    uniform, more, less = (share_of(picture, DIVERGING(place)) for place in (0.5, 1.0, 0.0))
    assert more > 0.03 and less > 0.03
    assert uniform == pytest.approx(more + less, rel=0.1)


@pytest.mark.parametrize("cosines", [np.ones((1, 1)), np.full((3, 3), 1.0), np.array([[1, -0.4], [-0.4, 1]])])
def test_cosines_of_any_sign(tmp_path: Path, cosines: np.ndarray) -> None:
    plot_cosines(tmp_path / "c.png", cosines, [f"step-{i}" for i in range(len(cosines))])
    assert imread(tmp_path / "c.png").std() > 0.05


def test_plot_that_cannot_be_written_raises(tmp_path: Path) -> None:
    (tmp_path / "nowhere").touch()  # a file is not a directory
    with pytest.raises(OutputError, match="nowhere"):
        plot_cosines(tmp_path / "nowhere" / "c.png", np.ones((2, 2)), ["a", "b"])
