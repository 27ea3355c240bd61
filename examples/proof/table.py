"""The tables of docs/proof.md, from the rows that `run.py` has left."""

from pathlib import Path
from statistics import mean
from typing import Any

from examples.proof.parts import Row, Rows, slug
from examples.proof.significance import difference

REFERENCE = "EMA"


def tables(out: Path, settings: dict[str, Any]) -> str:
    """Return both tables of a task as Markdown, of the seeds that have finished."""
    seeds = {seed: read(Rows(out / f"seed-{seed}"), settings) for seed in settings["seeds"]}
    finished = {seed: rows for seed, rows in seeds.items() if rows}
    if not finished:
        return "No seed has finished yet.\n"
    unfinished = [str(seed) for seed in seeds if seed not in finished]
    said = f"Finished seeds: {', '.join(map(str, finished))}."
    if unfinished:
        said += f" Not finished: {', '.join(unfinished)}."
    rows = list(finished.values())
    return "\n".join([said, "", *methods_table(rows), "", *claims_table(rows, settings["claims"]), ""])


def read(rows: Rows, settings: dict[str, Any]) -> dict[str, Row]:
    """Return the rows of a seed by method, with the cost of the trunk; none if a part of it is missing."""
    names = {name: slug(name) for name in settings["methods"]}
    if "trunk" not in rows or any(f"test/{part}" not in rows for part in names.values()):
        return {}
    trunk = rows["trunk"]
    return {
        name: {**rows[part], **rows[f"test/{part}"], "share": rows[part]["seconds"] / trunk["seconds"]}
        for name, part in names.items()
    }


def methods_table(seeds: list[dict[str, Row]]) -> list[str]:
    lines = [
        f"| method | steps | evaluations | seconds | test loss | against {REFERENCE} |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name in seeds[0]:
        of = {key: [rows[name][key] for rows in seeds] for key in ("steps", "evaluations", "share", "loss")}
        cost = f"{mean(of['steps']):.0f} | {mean(of['evaluations']):.0f} | {100 * mean(of['share']):.1f} %"
        against = difference(of["loss"], [rows[REFERENCE]["loss"] for rows in seeds])
        lines.append(f"| {name} | {cost} | {mean(of['loss']):.4f} | {'' if name == REFERENCE else against} |")
    return lines


def claims_table(seeds: list[dict[str, Row]], claims: list[list[str]]) -> list[str]:
    lines = ["| method | against | difference of the test losses | shown |", "| --- | --- | ---: | --- |"]
    for ours, theirs in claims:
        found = difference(*([rows[name]["loss"] for rows in seeds] for name in (ours, theirs)))
        lines.append(f"| {ours} | {theirs} | {found} | {found.verdict} |")
    return lines
