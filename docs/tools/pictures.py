"""Draw the pictures of the documentation as SVG files in docs/pictures; `--check` says whether they are stale.

Colors are CSS variables. A file that is shown by itself follows the reader's system; inside a page of the site it
follows the scheme of the page.
"""

import argparse
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[1] / "pictures"

LIGHT = {"ink": "#1f2430", "soft": "#5b6472", "line": "#8a93a3", "fill": "#eef1f6", "plane": "#dce8f8"}
LIGHT |= {"blue": "#1f5fbf", "orange": "#b34700", "green": "#18703c", "violet": "#6b3fa0"}
DARK = {"ink": "#e8eaf0", "soft": "#a9b1c0", "line": "#7f8898", "fill": "#2c3240", "plane": "#26364f"}
DARK |= {"blue": "#7db1ff", "orange": "#ff9d5c", "green": "#6fd08f", "violet": "#c3a2f2"}

Point = tuple[float, float]


def main() -> int:
    """Write the pictures, or with `--check` compare them with what would be written; 1 when one is stale."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 when a picture is stale")
    arguments = parser.parse_args()
    stale = []
    for name, draw in PICTURES.items():
        path, text = FOLDER / f"{name}.svg", draw()
        if arguments.check:
            stale += [] if path.exists() and path.read_text(encoding="utf-8") == text else [path.name]
        else:
            path.write_text(text, encoding="utf-8")
    if stale:
        print(f"docs/pictures is stale: {', '.join(stale)}; run docs/tools/pictures.py", file=sys.stderr)
    return 1 if stale else 0


def concept() -> str:
    """Draw the path of the checkpoints, the plane that they span, their mean, and the point that is learned."""
    path = [(150.0, 250.0), (215.0, 120.0), (290.0, 262.0), (372.0, 100.0), (450.0, 248.0)]
    mean = (sum(x for x, _ in path) / len(path), sum(y for _, y in path) / len(path))
    low = (425.0, 172.0)
    plane = [(60.0, 310.0), (160.0, 40.0), (640.0, 40.0), (540.0, 310.0)]
    parts = [polygon(plane, "plane")]
    parts += [
        f'<ellipse cx="{low[0]}" cy="{low[1]}" rx="{32 * i}" ry="{18 * i}" class="thin"/>' for i in (1, 2, 3, 4, 5)
    ]
    parts += [polyline([(75.0, 290.0), *path], "path")]
    for i, (x, y) in enumerate(path, 1):
        is_below = y > 200
        parts += [dot((x, y), "blue"), label((x, y + (24 if is_below else -14)), f"w{i}", "blue")]
    parts += [
        dot(mean, "orange"),
        label((mean[0] - 12, mean[1] + 5), "center", "orange", anchor="end"),
        arrow([(mean[0] + 9, mean[1] - 1), (low[0] - 11, low[1])], "green"),
        dot(low, "green"),
        label((low[0] + 14, low[1] + 5), "learned average", "green", anchor="start"),
        label((172, 66), "span: all weighted averages of the candidates", "soft", anchor="start"),
        label((665, 120), "contours: loss", "soft", anchor="start"),
        label((665, 160), "w1 to w5: candidates,", "blue", anchor="start"),
        label((665, 180), "one training run", "blue", anchor="start"),
        label((665, 220), "center: fixed weights,", "orange", anchor="start"),
        label((665, 240), "here the mean", "orange", anchor="start"),
        label((665, 280), "arrow: gradient descent", "green", anchor="start"),
        label((665, 300), "on the coefficients only", "green", anchor="start"),
    ]
    return svg("concept", 860, 340, parts)


def data_flow() -> str:
    """Draw what attach does once, and what moves in each step."""
    parts = [
        label((20, 26), "attach, once", "soft", anchor="start"),
        box(20, 40, 170, 64, "candidates", "files, read by byte range"),
        box(300, 40, 220, 64, "store of this rank", "center and n deltas of its spans"),
        box(640, 40, 200, 64, "basis T", "small matrix of each group"),
        arrow([(190, 72), (296, 72)]),
        label((243, 62), "its own bytes", "soft"),
        arrow([(520, 72), (636, 72)]),
        label((578, 62), "Gram matrix", "soft"),
        '<line x1="20" y1="134" x2="840" y2="134" class="dash"/>',
        label((20, 160), "each step", "soft", anchor="start"),
        box(20, 178, 170, 64, "backward", "gradient of its shard"),
        box(300, 178, 220, 64, "project", "s = ⟨delta, gradient⟩", "blue"),
        box(640, 178, 200, 64, "sum over ranks", "(n + 1) x G numbers", "orange"),
        box(640, 300, 200, 64, "optimizer", "steps the coefficients x"),
        box(300, 300, 220, 64, "combine", "w = center + Σ u · delta", "blue"),
        box(20, 300, 170, 64, "live weights", "in the model's own shard"),
        arrow([(190, 210), (296, 210)]),
        arrow([(520, 210), (636, 210)]),
        label((578, 200), "s", "soft"),
        arrow([(740, 242), (740, 296)]),
        label((752, 274), "x.grad = Tᵀ s", "soft", anchor="start"),
        arrow([(640, 332), (524, 332)]),
        label((582, 322), "u = T x", "soft"),
        arrow([(300, 332), (194, 332)]),
        arrow([(105, 300), (105, 246)]),
        label((117, 276), "forward", "soft", anchor="start"),
        arrow([(370, 104), (370, 174)]),
        arrow([(450, 104), (450, 150), (545, 150), (545, 282), (450, 282), (450, 296)]),
        label((360, 154), "deltas", "soft", anchor="end"),
        label((537, 274), "deltas, center", "soft", anchor="end"),
    ]
    return svg("data-flow", 860, 384, parts)


def memory() -> str:
    """Draw the bytes that a rank holds for each element of its shard, for 16 candidates."""
    n = 16
    rows: list[tuple[str, list[tuple[str, float]]]] = [
        ("AdamW", [("weights", 4), ("gradient", 4), ("moments", 8)]),
        *(
            (store, [("weights", 4), ("center", 4), ("deltas", n * size)])
            for store, size in (("dense32", 4.0), ("dense16", 2.0), ("packed8", 1.031), ("packed4", 0.531))
        ),
    ]
    colors = {"weights": "line", "gradient": "violet", "moments": "violet", "center": "orange", "deltas": "blue"}
    left, scale, parts = 110, 9.4, []
    for i, (name, pieces) in enumerate(rows):
        y, x = 48 + 44 * i, float(left)
        parts.append(label((left - 12, y + 19), name, "ink", anchor="end"))
        for part, size in pieces:
            parts.append(
                f'<rect x="{x:.1f}" y="{y}" width="{size * scale:.1f}" height="28" fill="var(--{colors[part]})"/>'
            )
            x += size * scale
        parts.append(label((x + 8, y + 19), f"{sum(size for _, size in pieces):.1f}", "soft", anchor="start"))
    names = [("weights", "line"), ("gradient and moments", "violet"), ("center", "orange"), ("16 deltas", "blue")]
    x = float(left)
    for text, color in names:
        parts.append(f'<rect x="{x}" y="14" width="14" height="14" fill="var(--{color})"/>')
        parts.append(label((x + 20, 26), text, "soft", anchor="start"))
        x += 44 + 7.6 * len(text)
    parts.append(
        label((left, 290), "bytes for each element of a rank's shard, float32 weights, n = 16", "soft", anchor="start")
    )
    return svg("memory", 860, 306, parts)


def svg(name: str, width: int, height: int, parts: Iterable[str]) -> str:
    """Return a whole file."""
    body = "\n".join(parts).replace("ARROW", f"arrow-{name}")
    head = (
        f'<svg class="picture" xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        f'font-family="system-ui, sans-serif" font-size="14">'
    )
    tip = "".join(
        f'<marker id="arrow-{name}-{color}" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7" markerHeight="7" '
        f'orient="auto"><path d="M0 0 L10 5 L0 10 z" fill="var(--{color})"/></marker>'
        for color in ("line", "green")
    )
    return f"{head}\n<style>{style()}</style>\n<defs>{tip}</defs>\n{body}\n</svg>\n"


def style() -> str:
    """Return the colors for both schemes, and the classes that use them."""
    light, dark = ("".join(f"--{name}:{value};" for name, value in colors.items()) for colors in (LIGHT, DARK))
    return (
        f".picture{{{light}}}@media (prefers-color-scheme: dark){{.picture{{{dark}}}}}"
        f'[data-md-color-scheme="default"] .picture{{{light}}}[data-md-color-scheme="slate"] .picture{{{dark}}}'
        ".picture .plane{fill:var(--plane);stroke:var(--line)}"
        ".picture .thin{fill:none;stroke:var(--line);stroke-width:1;opacity:.7}"
        ".picture .path{fill:none;stroke:var(--blue);stroke-width:1.5;stroke-dasharray:5 4}"
        ".picture .dash{stroke:var(--line);stroke-dasharray:3 5}"
        ".picture .box{fill:var(--fill);stroke-width:1.5}"
        ".picture .arrow{fill:none;stroke-width:1.8}"
    )


def box(x: float, y: float, width: float, height: float, title: str, text: str, color: str = "line") -> str:
    """Return a box with a title and one line below it."""
    middle = x + width / 2
    return (
        f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="6" class="box" stroke="var(--{color})"/>'
        + label((middle, y + 27), title, "ink", bold=True)
        + label((middle, y + 47), text, "soft", size=12.5)
    )


def label(at: Point, text: str, color: str, *, anchor: str = "middle", size: float = 14, bold: bool = False) -> str:
    """Return text."""
    weight = ' font-weight="600"' if bold else ""
    return (
        f'<text x="{at[0]:.1f}" y="{at[1]:.1f}" fill="var(--{color})" text-anchor="{anchor}" '
        f'font-size="{size}"{weight}>{text}</text>'
    )


def arrow(points: list[Point], color: str = "line") -> str:
    """Return a line with a tip at its last point."""
    listed = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return f'<polyline points="{listed}" class="arrow" stroke="var(--{color})" marker-end="url(#ARROW-{color})"/>'


def dot(at: Point, color: str) -> str:
    """Return a filled point."""
    return f'<circle cx="{at[0]:.1f}" cy="{at[1]:.1f}" r="6" fill="var(--{color})"/>'


def polyline(points: list[Point], kind: str) -> str:
    """Return an open line."""
    return f'<polyline points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in points)}" class="{kind}"/>'


def polygon(points: list[Point], kind: str) -> str:
    """Return a filled shape."""
    return f'<polygon points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in points)}" class="{kind}"/>'


PICTURES: dict[str, Callable[[], str]] = {"concept": concept, "data-flow": data_flow, "memory": memory}

if __name__ == "__main__":
    sys.exit(main())
