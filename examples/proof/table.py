"""The tables of docs/proof.md, from the rows that `run.py` has left."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from examples.proof.parts import Row, Rows, slug
from examples.proof.significance import difference

Seeds = Sequence[dict[str, Row]]
"""The rows of each finished seed, by method."""


@dataclass(frozen=True)
class Metric:
    """What methods are compared by."""

    name: str
    unit: float
    digits: int
    higher_is_better: bool

    def of(self, value: float) -> str:
        return f"{value / self.unit:.{self.digits}f}"


METRICS = {
    "loss": Metric("loss", 1.0, 4, False),
    "accuracy": Metric("accuracy", 0.01, 2, True),
    "ap": Metric("ap", 0.01, 2, True),
}


def tables(
    out: Path,
    settings: dict[str, Any],
    wanted: Sequence[int] | None = None,
    kept: Mapping[int, Mapping[str, Row]] | None = None,
) -> str:
    """Return the tables of a task as Markdown, of the `wanted` seeds that have finished; by default, of the final ones.

    Metrics are of the test split, or of the validation split if a seed is for development. A seed that has not finished
    below `out` is taken from the rows that the repository has `kept`.
    """
    wanted = settings["seeds"] if wanted is None else wanted
    split = "test" if set(wanted) <= set(settings["seeds"]) else "validation"
    seeds = {seed: read(Rows(out / f"seed-{seed}"), settings, split) for seed in wanted}
    seeds = {seed: rows or read((kept or {}).get(seed, {}), settings, split) for seed, rows in seeds.items()}
    finished = {seed: rows for seed, rows in seeds.items() if rows}
    if not finished:
        return "No seed has finished yet.\n"
    unfinished = [str(seed) for seed in seeds if seed not in finished]
    said = f"Finished seeds: {', '.join(map(str, finished))}."
    if unfinished:
        said += f" Not finished: {', '.join(unfinished)}."
    rows, compared = list(finished.values()), METRICS[settings.get("compared", "loss")]
    parts = [[said]]
    for table in settings["tables"]:
        names = table.get("methods", list(settings["methods"]))
        parts.append(methods_table(rows, names, table["reference"], split, compared))
    if "spreads" in settings:
        parts.append(spreads_table(rows, settings["spreads"], split, compared))
    if settings["claims"]:
        parts.append(claims_table(rows, settings["claims"], split, compared))
    return "\n\n".join("\n".join(lines) for lines in parts) + "\n"


def read(rows: Rows | Mapping[str, Row], settings: dict[str, Any], split: str) -> dict[str, Row]:
    """Return the rows of a seed by method, with its metrics on `split`, or none if a part is missing.

    `share` is the time of a method as a fraction of that of the parts `before`, which methods of its table start from.
    """
    names = {name: slug(name) for name in settings["methods"]}
    prefix = "test/" if split == "test" else ""
    if any(prefix + part not in rows for part in names.values()):
        return {}
    found = {}
    for table in settings["tables"]:
        seconds = sum(rows[part]["seconds"] for part in table.get("before", settings["before"]))
        for name in table.get("methods", names):
            row = rows[names[name]]
            metrics = rows[f"test/{names[name]}"] if split == "test" else row["validation"]
            found[name] = {**row, **metrics, "share": row["seconds"] / seconds}
    return found


def methods_table(seeds: Seeds, names: Sequence[str], reference: str, split: str, compared: Metric) -> list[str]:
    """Return a table of methods with their costs and their metrics on `split`."""
    shown = [metric for metric in METRICS.values() if metric.name in seeds[0][reference]]
    columns = ["steps", "evaluations", "seconds", *(f"{split} {metric.name}" for metric in shown)]
    lines = [f"| method | {' | '.join(columns)} | against {reference} |", f"| --- |{' ---: |' * (len(columns) + 1)}"]
    for name in names:
        of = {key: mean(rows[name][key] for rows in seeds) for key in ("steps", "evaluations", "share")}
        cells = [f"{of['steps']:.0f}", f"{of['evaluations']:.0f}", f"{100 * of['share']:.1f} %"]
        cells += [metric.of(mean(rows[name][metric.name] for rows in seeds)) for metric in shown]
        cells.append("" if name == reference else between(seeds, name, reference, compared)[0])
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def claims_table(seeds: Seeds, claims: Sequence[Sequence[Any]], split: str, compared: Metric) -> list[str]:
    """Return a table of the pairs that were to be compared."""
    lines = [f"| method | against | difference in {split} {compared.name} | shown |", "| --- | --- | ---: | --- |"]
    for ours, theirs, *margin in claims:
        against = theirs + "".join(f", margin {compared.of(limit)}" for limit in margin)
        lines.append(f"| {ours} | {against} | {' | '.join(between(seeds, ours, theirs, compared, *margin))} |")
    return lines


def between(seeds: Seeds, ours: str, theirs: str, compared: Metric, margin: float = 0.0) -> tuple[str, str]:
    """Return the difference of two methods, and what it shows."""
    found = difference(*([rows[name][compared.name] for rows in seeds] for name in (ours, theirs)))
    return found.shown(compared.unit, compared.digits), found.verdict(compared.higher_is_better, margin)


def spreads_table(seeds: Seeds, spreads: dict[str, Any], split: str, compared: Metric) -> list[str]:
    """Return a table of the largest minus the smallest value over several settings of a method.

    Args:
        seeds: the rows of each seed.
        spreads: for each of `methods`, the names of its rows; and the `reference`, of which half is compared.
        split: of the values.
        compared: what is taken from the rows.
    """
    values = {
        method: [max(found) - min(found) for found in ([rows[name][compared.name] for name in names] for rows in seeds)]
        for method, names in spreads["methods"].items()
    }
    half = [value / 2 for value in values[spreads["reference"]]]
    lines = [f"| method | spread of {split} {compared.name} | minus half of that of {spreads['reference']} | shown |"]
    lines.append("| --- | ---: | ---: | --- |")
    for method, found in values.items():
        against = difference(found, half)
        cells = compared.of(mean(found)), against.shown(compared.unit, compared.digits), against.verdict(False)
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return lines
