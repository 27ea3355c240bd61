"""Heat maps as tables of HTML. A color is laid over the background of the page, so that it suits light and dark."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from twa_scale.tools.report.elements import Html, el

_WITH_NUMBERS = 14  # the largest number of columns with numbers in cells
_NAMED = 20  # columns with names, if cells have no numbers
_CELLS = 6000
_MAX_COLUMNS = 64


def most_columns(num_rows: int) -> int:
    """Return the largest number of columns of a small map."""
    return max(8, min(_MAX_COLUMNS, _CELLS // max(num_rows, 1)))


def heat_map(
    title: str,
    rows: Sequence[str],
    columns: Mapping[str, Sequence[float | None]],
    *,
    middle: float | None,
    corner: str = "",
) -> Html:
    """Return a figure with a colored cell for each value.

    Args:
        title: the text above the map.
        rows: the names of the rows.
        columns: the values of each column; None for a missing value.
        middle: the value without a color. Larger values are orange, and smaller ones blue. None colors positive values
            by their size.
        corner: the title for the names of the columns.
    """
    values = [value for column in columns.values() for value in column if value is not None]
    colors = _Colors(middle, max((abs(value - (middle or 0.0)) for value in values), default=0.0) or 1.0)
    numbers = len(columns) <= _WITH_NUMBERS
    turned = "turn" if not numbers or any(len(name) > 8 for name in columns) else None
    every = 1 if numbers else -(-len(columns) // _NAMED)
    heads = [el("th", el("span", name) if i % every == 0 else None, class_=turned) for i, name in enumerate(columns)]
    body = [
        el("tr", el("th", name), *(_cell(name, at, column[i], colors, numbers) for at, column in columns.items()))
        for i, name in enumerate(rows)
    ]
    map_ = el(
        "table",
        el("thead", el("tr", el("th", corner), *heads)),
        el("tbody", *body),
        class_="heat" if numbers else "heat small",
    )
    return el(
        "figure",
        el("figcaption", title),
        colors.key(any(value < 0 for value in values)),
        el("div", map_, class_="wide"),
        class_="map",
    )


@dataclass(frozen=True)
class _Colors:
    middle: float | None
    reach: float

    def of(self, value: float) -> tuple[str, float]:
        """Return the class of a color, and its strength."""
        rises = self.middle is None or value < self.middle
        return "l" if rises else "m", min(abs(value - (self.middle or 0.0)) / self.reach, 1.0)

    def key(self, has_negative: bool) -> Html:
        """Return the legend of the colors."""
        middle = self.middle or 0.0
        ends = (
            [middle, middle + self.reach] if self.middle is None else [middle - self.reach, middle, middle + self.reach]
        )
        parts = []
        for value in ends:
            kind, strength = self.of(value)
            parts.append(el("span", el("i", class_=f"cell {kind}", style=f"--v:{strength:.2f}"), f"{value:.3g}"))
        if has_negative:
            parts.append(el("span", el("i", class_="cell n"), "negative"))
        return el("div", *parts, class_="keys")


def _cell(row: str, column: str, value: float | None, colors: _Colors, with_number: bool) -> Html:
    if value is None:
        return el("td", class_="none")
    kind, strength = colors.of(value)
    kinds = [kind] + ["s"] * (strength > 0.6) + ["n"] * (value < 0)
    text = f"{value:.2f}" if with_number else None
    return el("td", text, class_=" ".join(kinds), style=f"--v:{strength:.2f}", title=f"{row}, {column}: {value:.4g}")
