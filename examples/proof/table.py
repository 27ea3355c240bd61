"""The tables of docs/proof.md, from the rows that `run.py` has left."""

from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from examples.proof.parts import Row, Rows, slug
from examples.proof.significance import difference

Seeds = Sequence[dict[str, Row]]
"""The rows of each finished seed, by method."""


def tables(out: Path, settings: dict[str, Any], wanted: Sequence[int] | None = None) -> str:
    """Return the tables of a task as Markdown, of the `wanted` seeds that have finished; by default, of the final ones.

    Losses are on the test split, or on the validation split if a seed is for development.
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
    rows = list(finished.values())
    parts = [[said]]
    for table in settings["tables"]:
        names = table.get("methods", list(settings["methods"]))
        parts.append(methods_table(rows, names, table["reference"], split))
    parts.append(claims_table(rows, settings["claims"], split))
    return "\n\n".join("\n".join(lines) for lines in parts) + "\n"


def read(rows: Rows, settings: dict[str, Any], split: str) -> dict[str, Row]:
    """Return the rows of a seed by method, with the `loss` on `split`, or none if a part is missing.

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
        metrics = rows[f"test/{part}"] if split == "test" else {"loss": row["validation"]}
        found[name] = {**row, **metrics, "share": row["seconds"] / seconds}
    return found


def methods_table(seeds: Seeds, names: Sequence[str], reference: str, split: str) -> list[str]:
    """Return a table of methods with their costs and their losses on `split`."""
    accuracy = "accuracy" in seeds[0][reference]
    columns = ["steps", "evaluations", "seconds", *(["accuracy"] if accuracy else []), f"{split} loss"]
    lines = [f"| method | {' | '.join(columns)} | against {reference} |", f"| --- |{' ---: |' * (len(columns) + 1)}"]
    for name in names:
        of = {key: [rows[name][key] for rows in seeds] for key in ("steps", "evaluations", "share", "loss")}
        cells = [f"{mean(of['steps']):.0f}", f"{mean(of['evaluations']):.0f}", f"{100 * mean(of['share']):.1f} %"]
        if accuracy:
            cells.append(f"{100 * mean(rows[name]['accuracy'] for rows in seeds):.2f} %")
        against = difference(of["loss"], [rows[reference]["loss"] for rows in seeds])
        cells += [f"{mean(of['loss']):.4f}", "" if name == reference else str(against)]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def claims_table(seeds: Seeds, claims: Sequence[Sequence[str]], split: str) -> list[str]:
    """Return a table of the pairs that were to be compared."""
    lines = [f"| method | against | difference of the {split} losses | shown |", "| --- | --- | ---: | --- |"]
    for ours, theirs in claims:
        found = difference(*([rows[name]["loss"] for rows in seeds] for name in (ours, theirs)))
        lines.append(f"| {ours} | {theirs} | {found} | {found.verdict} |")
    return lines
