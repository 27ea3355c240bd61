"""Line charts as SVG, whose colors follow the style sheet of the page."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, floor, isfinite, log10

from twa_scale.tools.report.elements import Html, el, joined

Point = tuple[float, float]
_WIDTH, _HEIGHT = 480, 250
_LEFT, _RIGHT, _TOP, _BOTTOM = 66, 14, 12, 40
_MAX_POINTS = 240  # points of a curve; more points are replaced by a mean and a range
_MARKED = 40  # the largest number of points with marks


@dataclass(frozen=True)
class Curve:
    """Points (step, value) with increasing steps. Values that are not finite are left out."""

    label: str
    points: Sequence[Point]
    color: int = 0
    """The number of its color in the style sheet."""
    smooth: bool = False
    """Whether to draw a running mean, and the range of values behind it."""


@dataclass(frozen=True)
class Level:
    """A value to compare with, drawn as a dashed line."""

    label: str
    value: float
    color: int = 0


def chart(title: str, curves: Sequence[Curve], levels: Sequence[Level] = (), note: str | None = None) -> Html | None:
    """Return a figure with curves over the steps; None if there is nothing to draw.

    Args:
        title: the text above the chart.
        curves: the curves, drawn in this order.
        levels: the levels, drawn behind the curves.
        note: the text below the chart.
    """
    curves = [Curve(c.label, _finite(c.points), c.color, c.smooth) for c in curves]
    curves = [curve for curve in curves if curve.points]
    levels = [level for level in levels if isfinite(level.value)]
    if not curves:
        return None
    plot = _Plot(_range_of_steps(curves), _range_of_values(curves, levels))
    drawn = [plot.axes(), *map(plot.level, levels), *map(plot.curve, curves)]
    keys = [el("span", el("i", class_=f"key c{c.color}"), c.label) for c in curves]
    keys += [el("span", el("i", class_=f"key dashed c{level.color}"), level.label) for level in levels]
    box = {"viewBox": f"0 0 {_WIDTH} {_HEIGHT}", "role": "img", "aria_label": title}
    return el(
        "figure",
        el("figcaption", title),
        el("div", *keys, class_="keys"),
        el("svg", *drawn, **box),
        el("p", note, class_="note") if note else None,
    )


class _Plot:
    """The mapping from steps and values to positions."""

    def __init__(self, steps: Point, values: Point) -> None:
        self._steps, self._values = steps, values

    def x(self, step: float) -> float:
        low, high = self._steps
        return _LEFT + (step - low) / ((high - low) or 1) * (_WIDTH - _LEFT - _RIGHT)

    def y(self, value: float) -> float:
        low, high = self._values
        at = _HEIGHT - _BOTTOM - (value - low) / ((high - low) or 1) * (_HEIGHT - _TOP - _BOTTOM)
        return min(max(at, _TOP), _HEIGHT - _BOTTOM)  # the range of smoothed curves may go beyond

    def axes(self) -> Html:
        parts = []
        for value in ticks(*self._values, 4):
            y = f"{self.y(value):.1f}"
            parts.append(el("line", x1=_LEFT, x2=_WIDTH - _RIGHT, y1=y, y2=y, class_="grid"))
            parts.append(el("text", number(value), x=_LEFT - 7, y=y, dy=4, class_="tick end"))
        for step in ticks(*self._steps, 5):
            if step == int(step):
                parts.append(el("text", f"{int(step)}", x=f"{self.x(step):.1f}", y=_HEIGHT - 22, class_="tick middle"))
        parts.append(el("text", "step", x=(_LEFT + _WIDTH - _RIGHT) / 2, y=_HEIGHT - 5, class_="tick middle"))
        return joined(*parts)

    def level(self, level: Level) -> Html:
        y = f"{self.y(level.value):.1f}"
        tip = el("title", f"{level.label}: {level.value:.6g}")
        return el("line", tip, x1=_LEFT, x2=_WIDTH - _RIGHT, y1=y, y2=y, class_=f"level c{level.color}")

    def curve(self, curve: Curve) -> Html:
        if curve.smooth and len(curve.points) > 2:
            middle, low, high = smoothed(curve.points)
            ring = self._path([*high, *reversed(low)])
            return joined(
                el("path", d=f"{ring}Z", class_=f"band c{curve.color}"),
                el("path", d=self._path(middle), class_=f"line c{curve.color}"),
            )
        points = curve.points[:: ceil(len(curve.points) / _MAX_POINTS)]
        marks = [
            el(
                "circle",
                el("title", f"step {step:g}: {value:.6g}"),
                cx=f"{self.x(step):.1f}",
                cy=f"{self.y(value):.1f}",
                r=3.2,
                class_=f"mark c{curve.color}",
            )
            for step, value in (points if len(points) <= _MARKED else ())
        ]
        return joined(el("path", d=self._path(points), class_=f"line c{curve.color}"), *marks)

    def _path(self, points: Sequence[Point]) -> str:
        return "M" + "L".join(f"{self.x(step):.1f} {self.y(value):.1f}" for step, value in points)


def smoothed(points: Sequence[Point]) -> tuple[list[Point], list[Point], list[Point]]:
    """Return the centered running mean over about a tenth of the points, and the lowest and highest values in it."""
    half, every = max(len(points) // 20, 1), ceil(len(points) / _MAX_POINTS)
    middle, low, high = [], [], []
    for i in range(0, len(points), every):
        window = [value for _, value in points[max(i - half, 0) : i + half + 1]]
        step = points[i][0]
        middle.append((step, sum(window) / len(window)))
        low.append((step, min(window)))
        high.append((step, max(window)))
    return middle, low, high


def ticks(low: float, high: float, count: int) -> list[float]:
    """Return about `count` round numbers between two numbers."""
    if not high > low:
        return [low]
    rough = (high - low) / count
    unit = 10.0 ** floor(log10(rough))
    step = next(factor * unit for factor in (1, 2, 5, 10) if factor * unit >= rough * 0.999)
    return [i * step for i in range(ceil(low / step - 1e-9), floor(high / step + 1e-9) + 1)]


def number(value: float) -> str:
    """Return a short text of a number for a tick."""
    text = f"{value:.4g}"
    return "0" if abs(value) < 1e-12 else text


def _finite(points: Sequence[Point]) -> list[Point]:
    return [(step, value) for step, value in points if isfinite(value)]


def _range_of_steps(curves: Sequence[Curve]) -> Point:
    steps = [step for curve in curves for step, _ in curve.points]
    return min(steps), max(steps)


def _range_of_values(curves: Sequence[Curve], levels: Sequence[Level]) -> Point:
    """Return the range of the drawn values, without the outermost values of the ranges around smoothed curves."""
    values = [level.value for level in levels]
    for curve in curves:
        if curve.smooth:
            middle, low, high = smoothed(curve.points)
            values += [value for _, value in middle]
            values.append(sorted(value for _, value in low)[len(low) // 20])
            values.append(sorted(value for _, value in high)[-1 - len(high) // 20])
        else:
            values += [value for _, value in curve.points]
    bottom, top = min(values), max(values)
    room = 0.08 * (top - bottom) or 0.05 * abs(top) or 1.0
    return bottom - room, top + room
