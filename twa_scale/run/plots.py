"""Plots of the coefficients and losses of a run, and of the similarity of candidates."""

from collections.abc import Iterator, Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colorbar import Colorbar
from matplotlib.colors import Colormap, LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from twa_scale.base.names import without_common_folders
from twa_scale.output.publish import replace_file

Array = npt.NDArray[Any]

INK, MUTED, LINE = "#22262e", "#8a8f99", "#d9dce1"
LOW, HIGH, MARK = "#2f6690", "#c8553d", "#3a7d44"
DIVERGING = LinearSegmentedColormap.from_list("twa", ["#173b57", LOW, "#a9c4d6", "#f7f5f2", "#ecb9a6", HIGH, "#7d2a1b"])
RISING = LinearSegmentedColormap.from_list("twa-rising", ["#f7f5f2", "#a9c4d6", LOW, "#173b57"])

STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": LINE,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": LINE,
    "ytick.color": LINE,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
}
# With more, numbers in cells and labels of axes overlap.
MAX_NUMBERS, MAX_LABELS = 20, 64


def plot_training(
    path: str | Path,
    coefficients: Array,
    candidate_labels: Sequence[str],
    group_names: Sequence[str],
    records: Sequence[dict[str, Any]],
) -> None:
    """Write a PNG with the averaging coefficients and the losses of a run, side by side or one above the other.

    Args:
        path: the file; it is replaced atomically.
        coefficients: a[i, g], shape (n, G).
        candidate_labels: n names, in training order.
        group_names: G names.
        records: records of metrics.jsonl: `step` with `loss` (training) or with `SPLIT/loss` (evaluation). The
            evaluation of step 0 is drawn as a horizontal line.

    Raises:
        OutputError: the file cannot be written.
    """
    n, num_groups = coefficients.shape
    wide = num_groups > 12
    rows = min(n, MAX_LABELS)
    with rc_context(STYLE):
        if wide:
            width = max(9.0, 3 + 0.19 * min(num_groups, 90))
            figure = Figure(figsize=(width, 5.4 + 0.26 * rows), layout="constrained")
            top, bottom = figure.subplots(2, 1, height_ratios=(0.26 * rows + 1.6, 3.2))
        else:
            figure = Figure(figsize=(9.2 + 0.42 * num_groups, max(3.8, 1.8 + 0.28 * rows)), layout="constrained")
            top, bottom = figure.subplots(1, 2, width_ratios=(3.4 + 0.42 * num_groups, 5.2))
        figure.get_layout_engine().set(w_pad=0.2, h_pad=0.2)  # type: ignore[union-attr, call-arg]
        if num_groups == 1:
            _bars(top, coefficients[:, 0], candidate_labels)
        else:
            _coefficients(top, coefficients, candidate_labels, group_names)
        _losses(bottom, records)
        _save(figure, Path(path))


def plot_cosines(path: str | Path, matrix: Array, labels: Sequence[str]) -> None:
    """Write a PNG of cosines between candidates.

    Args:
        path: the file; it is replaced atomically.
        matrix: the cosines, shape (n, n).
        labels: n names, in training order.

    Raises:
        OutputError: the file cannot be written.
    """
    n = len(labels)
    away = matrix[~np.eye(n, dtype=bool)]
    low = float(np.nanmin(away, initial=1.0))
    with rc_context(STYLE):
        size = max(4.0, 1.6 + 0.34 * min(n, MAX_LABELS))
        figure = Figure(figsize=(size + 0.9, size), layout="constrained")
        axes = figure.subplots()
        if low < 0:
            _heat_map(axes, matrix, DIVERGING, Normalize(-1, 1), labels, labels, 2)
        else:
            # Cosines between checkpoints of one run often differ in the third digit: start the scale at the smallest.
            _heat_map(
                axes,
                matrix,
                RISING,
                Normalize(min(low, 0.999), 1),
                labels,
                labels,
                3 if low > 0.9 else 2,
            )
        axes.set_aspect("equal")
        axes.set_title("Cosines between candidates")
        _save(figure, Path(path), bbox_inches="tight", pad_inches=0.2)  # equal aspect leaves margins


def plot_rows(path: str | Path, corrections: Mapping[str, Array]) -> None:
    """Write a PNG of the spread of the corrections of rows: by tensor, their median and quantiles.

    Args:
        path: the file; it is replaced atomically.
        corrections: for each tensor, in the order of the model, the norm of the correction of the averaging
            coefficients of each row: (rows,).

    Raises:
        OutputError: the file cannot be written.
    """
    positions = np.arange(len(corrections)) + 0.5
    low, lower, middle, upper, high = np.array(
        [np.quantile(of_tensor, (0.05, 0.25, 0.5, 0.75, 0.95)) for of_tensor in corrections.values()]
    ).T
    with rc_context(STYLE):
        figure = Figure(figsize=(max(6.0, 2.4 + 0.19 * min(len(positions), 90)), 5.2), layout="constrained")
        axes = figure.subplots()
        axes.bar(positions, high - low, 0.3, low, color=LINE, label="5 to 95 % of the rows")
        axes.bar(positions, upper - lower, 0.6, lower, color=LOW, label="25 to 75 %")
        axes.hlines(middle, positions - 0.3, positions + 0.3, color=HIGH, linewidth=1.6, label="median")
        axes.set_ylim(bottom=0)
        axes.set_xlim(0, len(positions))
        axes.grid(axis="y", color=LINE, linewidth=0.6)
        axes.set_axisbelow(True)
        _name_ticks(axes, "x", list(corrections))
        axes.set_title("Corrections of the coefficients of single rows, by tensor")
        axes.set_ylabel("norm over the candidates")
        axes.legend(loc="best", fontsize=8.5)
        _save(figure, Path(path))


def _coefficients(axes: Axes, values: Array, candidates: Sequence[str], groups: Sequence[str]) -> None:
    # The scale is centered at the uniform weight: colors show more or less than in the plain mean.
    uniform = 1 / len(values)
    reach = max(float(np.nanmax(np.abs(values - uniform), initial=0.0)), 0.1 * uniform)
    scale = Normalize(uniform - reach, uniform + reach)
    bar = _heat_map(axes, values, DIVERGING, scale, candidates, groups, 2)
    ticks = {uniform - reach: "", uniform: " uniform", uniform + reach: ""}
    if min(abs(tick) for tick in ticks) > 0.2 * reach and reach > uniform:
        ticks[0.0] = ""
    bar.set_ticks(list(ticks), labels=[f"{tick:.2f}{word}" for tick, word in ticks.items()])
    axes.set_title("Averaging coefficients by candidate and group")


def _heat_map(
    axes: Axes,
    values: Array,
    colors: Colormap,
    scale: Normalize,
    rows: Sequence[str],
    columns: Sequence[str],
    digits: int,
) -> Colorbar:
    image = axes.pcolormesh(
        values, cmap=colors, norm=scale, edgecolors="white", linewidth=0.8 if values.size < 3000 else 0
    )
    axes.invert_yaxis()
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    _name_ticks(axes, "y", rows)
    _name_ticks(axes, "x", columns)
    if max(values.shape) <= MAX_NUMBERS:
        _write_numbers(axes, values, digits, ScalarMappable(scale, colors))
    bar = axes.figure.colorbar(image, ax=axes, pad=0.015, aspect=30, shrink=0.9)
    bar.outline.set_visible(False)
    return bar


def _write_numbers(axes: Axes, values: Array, digits: int, colors: ScalarMappable) -> None:
    for (row, column), value in np.ndenumerate(values):
        red, green, blue, _ = colors.to_rgba(value)
        dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.55
        color = "white" if dark else INK
        text = _number(value, digits)
        axes.text(column + 0.5, row + 0.5, text, ha="center", va="center", color=color, fontsize=6.5)


def _number(value: float, digits: int) -> str:
    return f"{round(value, digits) + 0.0:.{digits}f}"  # adding 0.0 makes -0.0 a plain zero


def _name_ticks(axes: Axes, side: str, labels: Sequence[str]) -> None:
    every = -(-len(labels) // MAX_LABELS)
    indices = range(0, len(labels), every)
    names = list(_short(labels))
    axis = axes.yaxis if side == "y" else axes.xaxis
    upright = side == "x" and (len(labels) > 8 or max(map(len, names)) > 5)
    size = 8 if len(labels) <= 24 else 6.5
    turn: dict[str, Any] = {"rotation": 90} if upright else {}
    axis.set_ticks([i + 0.5 for i in indices], labels=[names[i] for i in indices], fontsize=size, **turn)


def _short(labels: Sequence[str], longest: int = 44) -> Iterator[str]:
    """Yield labels without their common folders; long ones are shortened in the middle."""
    for name in without_common_folders(labels):
        yield name if len(name) <= longest else f"{name[: longest // 2 - 1]}…{name[-longest // 2 :]}"


def _bars(axes: Axes, values: Array, candidates: Sequence[str]) -> None:
    uniform = 1 / len(values)
    colors = [HIGH if value >= uniform else LOW for value in values]
    positions = np.arange(len(values)) + 0.5
    axes.barh(positions, values, height=0.72, color=colors)
    axes.axvline(0, color=INK, linewidth=0.8)
    axes.axvline(uniform, color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
    axes.set_ylim(len(values), 0)
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.margins(x=0.14)
    _name_ticks(axes, "y", candidates)
    if len(values) <= MAX_NUMBERS:
        for position, value in zip(positions, values, strict=True):
            at: dict[str, Any] = {"xytext": (4, 0), "ha": "left"} if value >= 0 else {"xytext": (-4, 0), "ha": "right"}
            page = {"facecolor": "white", "edgecolor": "none", "pad": 0.8}  # covers the dashed line
            number = _number(value, 2)
            axes.annotate(
                number, (value, position), **at, textcoords="offset points", va="center", fontsize=8, bbox=page
            )
    axes.set_title("Coefficients by candidate")
    axes.set_xlabel("averaging coefficient; dashed: uniform")


def _losses(axes: Axes, records: Sequence[dict[str, Any]]) -> None:
    trained = [(r["step"], r["loss"]) for r in records if "loss" in r]
    if trained:
        steps, losses = zip(*trained, strict=True)
        smooth = _smooth(np.array(losses))
        axes.plot(steps, losses, color=MUTED, linewidth=0.8, alpha=0.45)
        axes.plot(steps, smooth, color=INK, linewidth=1.6, label="training batches")
    splits = dict.fromkeys(key for r in records for key in r if key.endswith("/loss"))
    for key, color in zip(splits, (HIGH, LOW, MARK), strict=False):
        points = [(r["step"], r[key]) for r in records if key in r]
        if points[0][0] == 0:
            axes.axhline(points[0][1], color=color, linewidth=1, linestyle=(0, (4, 3)), label="before the first step")
        axes.plot(
            *zip(*points, strict=True),
            color=color,
            linewidth=1.6,
            marker="o",
            markersize=4,
            label=key.split("/")[0],
        )
    _fit_to_labeled_curves(axes)
    axes.grid(axis="y", color=LINE, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.set_title("Loss")
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="best", fontsize=8.5)


def _fit_to_labeled_curves(axes: Axes) -> None:
    """Fit the axis to the curves with a label: losses of single batches vary more than the average improves."""
    named = [line for line in axes.get_lines() if not str(line.get_label()).startswith("_")]
    heights = np.concatenate([np.asarray(line.get_ydata(), dtype=float) for line in named] or [np.empty(0)])
    heights = heights[np.isfinite(heights)]
    if len(heights) and np.ptp(heights) > 0:
        room = 0.35 * float(np.ptp(heights))
        axes.set_ylim(heights.min() - room, heights.max() + room)


def _smooth(values: Array) -> Array:
    """Return the centered running mean over about a tenth of the run."""
    half = len(values) // 20
    positions = np.arange(len(values))
    first, last = np.maximum(positions - half, 0), np.minimum(positions + half + 1, len(values))
    sums = np.concatenate([[0.0], np.cumsum(values)])
    means: Array = (sums[last] - sums[first]) / (last - first)
    return means


def _save(figure: Figure, path: Path, **options: Any) -> None:
    picture = BytesIO()
    figure.savefig(picture, format="png", dpi=160, facecolor="white", **options)
    replace_file(path, picture.getvalue())
