"""The tables of docs/proof.md, from the rows that `run.py` has left."""

from collections.abc import Sequence
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


METRICS = {"loss": Metric("loss", 1.0, 4, False), "accuracy": Metric("accuracy", 0.01, 2, True)}


def tables(out: Path, settings: dict[str, Any], wanted: Sequence[int] | None = None) -> str:
    """Return the tables of a task as Markdown, of the `wanted` seeds that have finished; by default, of the final ones.

    Metrics are of the test split, or of the validation split if a seed is for development.
    """
    wanted = settings["seeds"] if wanted is None else wanted
    split = "test" if set(wanted) <= set(settings["seeds"]) else "validation"
    seeds = {seed: read(Rows(out / f"seed-{seed}"), settings, split) for seed in wanted}
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
    parts.append(claims_table(rows, settings["claims"], split, compared))
    return "\n\n".join("\n".join(lines) for lines in parts) + "\n"


def read(rows: Rows, settings: dict[str, Any], split: str) -> dict[str, Row]:
    """Return the rows of a seed by method, with its metrics on `split`, or none if a part is missing.

    `share` is the time of a method as a fraction of that of the parts `before`, which methods start from.
    """
    names = {name: slug(name) for name in settings["methods"]}
    prefix = "test/" if split == "test" else ""
    if any(prefix + part not in rows for part in names.values()):
        return {}
    seconds = sum(rows[part]["seconds"] for part in settings["before"])
    found = {}
    for name, part in names.items():
        row = rows[part]
        metrics = rows[f"test/{part}"] if split == "test" else row["validation"]
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


def claims_table(seeds: Seeds, claims: Sequence[Sequence[str]], split: str, compared: Metric) -> list[str]:
    """Return a table of the pairs that were to be compared."""
    lines = [f"| method | against | difference in {split} {compared.name} | shown |", "| --- | --- | ---: | --- |"]
    for ours, theirs in claims:
        lines.append(f"| {ours} | {theirs} | {' | '.join(between(seeds, ours, theirs, compared))} |")
    return lines


def between(seeds: Seeds, ours: str, theirs: str, compared: Metric) -> tuple[str, str]:
    """Return the difference of two methods, and what it shows."""
    found = difference(*([rows[name][compared.name] for rows in seeds] for name in (ours, theirs)))
    return found.shown(compared.unit, compared.digits), found.verdict(compared.higher_is_better)
