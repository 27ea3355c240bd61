"""What commands print: tables for people, JSON for machines."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rich.markup import escape
from rich.table import Table

from twa_scale.bench import Bench, Measured
from twa_scale.inspection import Inspection
from twa_scale.plan import Plan


def human_bytes(nbytes: float) -> str:
    """Return 1234567 as "1.2 MB"."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(nbytes) < 1000:
            return f"{nbytes:.0f} B" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1000
    return f"{nbytes:.1f} TB"


def plan_json(plan: Plan) -> str:
    """Return the plan and its peak as JSON; sizes in bytes."""
    return json.dumps({**asdict(plan), "peak": plan.peak}, indent=2)


def plan_table(plan: Plan, ranks: int) -> Table:
    """Return the plan as a table."""
    title = (
        f"{plan.num_candidates} candidates, {plan.trained_elements:,} trained elements in {plan.num_groups} groups, "
        f"{ranks} {'rank' if ranks == 1 else 'ranks'}"
    )
    table = Table(title=title, caption="; ".join(plan.notes) or None)
    for column in ("", "per rank", "bytes"):
        table.add_column(column, justify="right" if column == "bytes" else "left")
    sections = {
        "memory, always": plan.memory,
        "memory, while reading candidates": plan.attach,
        "memory, during a step": plan.step,
        "peak memory": {"": plan.peak},
        "read from the candidates": {"": plan.bytes_read},
        "sent in a step": plan.wire,
        "sent to other pods in a step": plan.wire_between_pods,
    }
    for section, rows in sections.items():
        for i, (name, nbytes) in enumerate(rows.items()):
            table.add_row(section if i == 0 else "", name, human_bytes(nbytes))
        table.add_section()
    return table


def bench_json(bench: Bench, files: Sequence[Measured] = ()) -> str:
    """Return what was measured as JSON: seconds, bytes, and bytes per second."""

    def plain(rows: Sequence[Measured]) -> list[dict[str, object]]:
        return [{**asdict(row), "rate": row.rate} for row in rows]

    stores = {name: plain(rows) for name, rows in bench.stores.items()}
    lists = {"memory": plain(bench.memory), "stores": stores, "others": plain(bench.others), "streaming": plain(files)}
    return json.dumps({**asdict(bench), **lists, "read": bench.read}, indent=2)


def bench_table(bench: Bench, files: Sequence[Measured] = ()) -> Table:
    """Return one row for each thing that was measured; shares are of the best rate of reading."""
    title = f"{bench.elements:,} elements, {bench.candidates} candidates, {bench.device}, {bench.threads} threads"
    table = Table(title=title, caption="best of several; bytes: each that has to move, counted once")
    for column in ("", "", "ms", "moved", "GB/s", "of read"):
        table.add_column(column, justify="right" if column else "left")
    for section, rows in {"memory": bench.memory, **bench.stores, "beside": bench.others, "files": files}.items():
        for i, row in enumerate(rows):
            share = f"{row.rate / bench.read:.0%}"
            cells = (f"{1e3 * row.seconds:.3f}", human_bytes(row.nbytes), f"{row.rate / 1e9:.1f}", share)
            table.add_row(section if i == 0 else "", row.what, *cells)
        table.add_section()
    return table


def inspection_json(found: Inspection) -> str:
    """Return what was found as JSON; a cosine with a delta of zero norm is null."""
    plain = asdict(found)
    cosines = [[None if value != value else value for value in row] for row in found.cosines.tolist()]
    return json.dumps({**plain, "cosines": cosines, "distances": found.distances.tolist()}, indent=2)


def inspection_table(found: Inspection) -> Table:
    """Return one row for each candidate."""
    table = Table(caption="delta: to the mean of these candidates; cosine: of a delta and the one above")
    table.add_column("candidate", overflow="fold")
    for column in ("tensors", "elements", "dtype", "norm", "delta", "cosine"):
        table.add_column(column, justify="left" if column == "dtype" else "right", no_wrap=column != "dtype")
    for i, label in enumerate(found.labels):
        table.add_row(
            escape(Path(label).name),
            f"{found.tensors[i]:,}",
            f"{found.elements[i]:,}",
            found.dtypes[i],
            f"{found.norms[i]:.4g}",
            f"{found.delta_norms[i]:.4g}",
            f"{found.cosines[i, i - 1]:+.3f}" if i else "",
        )
    return table
