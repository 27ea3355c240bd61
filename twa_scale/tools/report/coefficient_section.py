"""The section of a report on candidates and their coefficients."""

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from twa_scale.average.measures import COEFFICIENTS
from twa_scale.base.names import plural
from twa_scale.base.sizes import size_text
from twa_scale.tools.report.coefficients import OUTSIDE, Coefficients, merged
from twa_scale.tools.report.elements import Content, Html, el, joined, table
from twa_scale.tools.report.heat import heat_map, most_columns
from twa_scale.tools.report.run_data import RunData

EFFECTIVE_IS = (
    "The effective number of candidates is (sum of a)² / (sum of a²), which is 1 / sum of a² for coefficients that sum "
    "to 1: the uniform mean of so many candidates reduces independent noise of the candidates as much. It is n for the "
    "uniform mean, 1 for a single candidate, and less than 1 if large coefficients of both signs amplify noise. "
    "With several groups it is the harmonic mean over all elements."
)
_MAX_CANDIDATES = 500


def coefficient_section(run: RunData) -> Html | None:
    """Return the candidates, their coefficients by depth, kind and step, and the meaning of negative ones."""
    coefficients = run.coefficients
    if coefficients is None:
        return None
    n, groups = coefficients.values.shape
    of = f" at {run.coefficients_of}" if run.coefficients_of else ""
    return joined(
        el("h2", "Candidates and coefficients"),
        el(
            "p",
            f"The average is w = sum of a·w over {_count(n, 'candidate')}, with one coefficient a for each candidate "
            f"and group of tensors ({_count(groups, 'group')}){of}. The mean is over all elements.",
        ),
        _rows_note(run),
        _candidates(run, coefficients),
        el("p", f"{coefficients.effective:.2f} effective candidates of {n}. {EFFECTIVE_IS}", class_="note"),
        _negative(coefficients),
        el("div", *_maps(run, coefficients), class_="maps"),
    )


def _rows_note(run: RunData) -> Html | None:
    if not run.corrects_rows:
        return None
    return el("p", "Single rows of matrices have corrections, which are not part of the coefficients here: rows.png.")


def _candidates(run: RunData, coefficients: Coefficients) -> Html:
    distances = run.summary.candidate_distances if run.summary else []
    sizes = [_size(path) for path in run.paths] if len(run.paths) == len(coefficients.labels) else []
    head = ["candidate", "mean coefficient", ""]
    several = coefficients.values.shape[1] > 1
    head += ["smallest", "largest"] if several else []
    head += ["step"] if any(step is not None for step in coefficients.steps) else []
    head += ["distance from the center"] if len(distances) == len(coefficients.labels) else []
    head += ["size on disk"] if sizes else []
    low, high = min(0.0, *coefficients.means), max(0.0, *coefficients.means)
    rows: list[list[Content]] = []
    for i, name in enumerate(coefficients.names[:_MAX_CANDIDATES]):
        row: list[Content] = [el("span", name, title=coefficients.labels[i]), f"{coefficients.means[i]:.4f}"]
        row.append(_bar(coefficients.means[i], low, high, 1 / len(coefficients.labels)))
        if several:
            row += [f"{float(coefficients.values[i].min()):.4f}", f"{float(coefficients.values[i].max()):.4f}"]
        if "step" in head:
            row.append("" if coefficients.steps[i] is None else str(coefficients.steps[i]))
        if "distance from the center" in head:
            row.append(f"{distances[i]:.5g}")
        if sizes:
            row.append(sizes[i])
        rows.append(row)
    more = len(coefficients.labels) - len(rows)
    return joined(table(head, rows), el("p", f"and {more} more candidates", class_="note") if more else None)


def _bar(value: float, low: float, high: float, uniform: float) -> Html:
    scale = 100 / ((high - low) or 1)
    zero, width = -low * scale, abs(value) * scale
    start = zero if value >= 0 else zero - width
    part = el("i", class_="more" if value >= uniform else "less", style=f"left:{start:.1f}%;width:{width:.1f}%")
    return el("span", part, class_="bar", style=f"--zero:{zero:.1f}%")


def _negative(coefficients: Coefficients) -> Html:
    """Return the meaning of negative coefficients, with the smallest one."""
    count = coefficients.values.numel()
    if not coefficients.negative:
        return el("p", "No coefficient is negative: the average is an interpolation of the candidates.")
    value, candidate, group = coefficients.negative[0]
    suffix = f" (group {coefficients.groups[group]})" if len(coefficients.groups) > 1 else ""
    return joined(
        el(
            "p",
            f"{len(coefficients.negative)} of {_count(count, 'coefficient')} are negative; the smallest is "
            f"{value:.4f}, of "
            f"{coefficients.names[candidate]}{suffix}.",
        ),
        el(
            "details",
            el("summary", "What a negative coefficient means"),
            el(
                "p",
                "The average is an extrapolation in the direction from that candidate to the others. In one training "
                "run, the coefficients of early candidates are often negative, because the loss still falls in the "
                "direction of training. The coefficients of a group sum to 1, so others are larger.",
            ),
            el(
                "p",
                "Such an average is not an interpolation of the candidates, so judge it by the evaluations on "
                "held-out data. With basis: simplex, all coefficients are positive. The coefficients of nearly equal "
                "candidates can be large with both signs and cancel; the distance from the center then remains small.",
            ),
        ),
    )


def _maps(run: RunData, coefficients: Coefficients) -> list[Html]:
    n = len(coefficients.labels)
    uniform, maps = 1 / n, []
    over_time = _by_step(run.records, n)
    if len(over_time) > 1:
        maps.append(heat_map("Mean coefficient by step", coefficients.names, over_time, middle=uniform, corner="step"))
    if coefficients.values.shape[1] == 1:
        return maps
    max_columns = most_columns(n)
    for title, corner, columns in (
        ("Coefficients by depth", "block", coefficients.by(lambda place: place.block)),
        ("Coefficients by kind of tensor", "kind", coefficients.by(lambda place: place.kind)),
    ):
        if len(columns) > 1:
            maps.append(
                heat_map(title, coefficients.names, merged(columns, max_columns), middle=uniform, corner=corner)
            )
    maps.extend(_effective_map(coefficients))
    return maps


def _effective_map(coefficients: Coefficients) -> list[Html]:
    """Return a map of the effective number of candidates by kind and block, if each tensor has its own group."""
    kinds = list(
        dict.fromkeys(position.kind for position in coefficients.positions.values() if position.block != OUTSIDE)
    )
    blocks = list(
        dict.fromkeys(position.block for position in coefficients.positions.values() if position.block != OUTSIDE)
    )
    if len(kinds) < 2 or len(blocks) < 2 or len(coefficients.groups) < 4 or len(kinds) > 64:
        return []
    at = {coefficients.positions[tensor.name]: tensor.group for tensor in coefficients.tensors}
    columns = {
        block: [
            coefficients.effective_of(at[position]) if (position := type(next(iter(at)))(block, kind)) in at else None
            for kind in kinds
        ]
        for block in blocks[:: -(-len(blocks) // most_columns(len(kinds)))]
    }
    title = "Effective number of candidates by kind and depth"
    return [heat_map(title, kinds, columns, middle=None, corner="block")]


def _by_step(records: Sequence[dict[str, Any]], n: int) -> dict[str, list[float]]:
    """Return the recorded mean coefficients by step, at even distances if there are many."""
    columns = {}
    for record in records:
        values = [value for key, value in sorted(record.items()) if key.startswith(COEFFICIENTS)]
        if len(values) == n:
            columns[str(record["step"])] = values
    return _limited(columns, most_columns(n))


def _limited(columns: dict[str, list[float]], limit: int) -> dict[str, list[float]]:
    names = list(columns)
    kept = names[:: -(-len(names) // limit)] if names else []
    return {name: columns[name] for name in dict.fromkeys([*kept, *names[-1:]])}


def _size(path: str) -> str:
    """Return the size of the files of a candidate."""
    on_disk = Path(path)
    try:
        files = [on_disk] if on_disk.is_file() else [file for file in on_disk.rglob("*") if file.is_file()]
        return size_text(sum(file.stat().st_size for file in files)) if files else "deleted"
    except OSError:
        return "unknown"


def _count(count: int, noun: str) -> str:
    return f"{count:,} {plural(count, noun)}"


def mean_distance(distances: Sequence[float]) -> float | None:
    """Return the mean distance of the candidates from the center."""
    return fmean(distances) if distances else None
