"""What commands print: tables for people, JSON for machines."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rich.console import Group
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from twa_scale.bench import Bench, Measured
from twa_scale.choices import Choices
from twa_scale.forecast import Forecast
from twa_scale.inspection import Inspection
from twa_scale.plan import Plan


def human_bytes(nbytes: float) -> str:
    """Return 1234567 as "1.2 MB"."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(nbytes) < 1000:
            return f"{nbytes:.0f} B" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1000
    return f"{nbytes:.1f} TB"


def plan_json(plan: Plan, choices: Choices) -> str:
    """Return the plan, its peak and the stores as JSON; sizes in bytes."""
    stores = {**asdict(choices), "most_exact": choices.most_exact, "verdict": choices.verdict}
    return json.dumps({**asdict(plan), "peak": plan.peak, "stores": stores}, indent=2)


def plan_tables(plan: Plan, choices: Choices) -> Group:
    """Return the plan, the stores in its place, and which of them fits."""
    verdict = Text(choices.verdict, "" if choices.own.fits else "bold red")
    return Group(_plan_table(plan), _stores_table(choices), verdict)


def _stores_table(choices: Choices) -> Table:
    source = f"assumed: {choices.assumed}; --memory says otherwise" if choices.assumed else "as given"
    caption = f"memory of a rank: {human_bytes(choices.memory)}, {source}"
    if choices.own.host:
        caption += f"; host memory, if all ranks share that of this machine: {human_bytes(choices.host_memory)}"
    table = Table(title="stores, per rank", caption=caption)
    for column in ("store", "bytes", "peak", "moved in a step", "fits"):
        table.add_column(column, justify="left" if column in ("store", "fits") else "right")
    for choice in choices.stores:
        own = choice.store == choices.configured
        fits = f"no: {choice.obstacle}" if choice.obstacle else "yes" if choice.fits else "no"
        if choice.page_cache:
            fits += f", with {human_bytes(choice.page_cache)} of page cache"
        if choice.host:
            fits += f", with {human_bytes(choice.host)} of host memory"
        sizes = (human_bytes(size) for size in (choice.nbytes, choice.peak, sum(choice.moved.values())))
        table.add_row(choice.store + (", configured" if own else ""), *sizes, fits, style="bold" if own else "")
    return table


def _plan_table(plan: Plan) -> Table:
    title = (
        f"{plan.num_candidates} candidates, {plan.trained_elements:,} trained elements in {plan.num_groups} groups, "
        f"{plan.ranks} {'rank' if plan.ranks == 1 else 'ranks'}"
    )
    table = Table(title=title, caption="; ".join(plan.notes) or None)
    for column in ("", "per rank", "bytes"):
        table.add_column(column, justify="right" if column == "bytes" else "left")
    sections = {
        "memory, always": plan.memory,
        "memory, while reading candidates": plan.attach,
        "memory, during a step": plan.step,
        "peak memory": {"": plan.peak},
        "host memory": plan.host,
        "read from the candidates": {"": plan.bytes_read},
        "sent in a step": plan.wire,
        "sent to other pods in a step": plan.wire_between_pods,
    }
    for section, rows in sections.items():
        for i, (name, nbytes) in enumerate(rows.items()):
            table.add_row(section if i == 0 else "", name, human_bytes(nbytes))
        table.add_section()
    return table


def bench_json(bench: Bench, files: Sequence[Measured] = (), expected: Forecast | None = None) -> str:
    """Return what was measured as JSON: seconds, bytes, and bytes per second; and a planned run's step."""

    def plain(rows: Sequence[Measured]) -> list[dict[str, object]]:
        return [{**asdict(row), "rate": row.rate} for row in rows]

    stores = {name: plain(rows) for name, rows in bench.stores.items()}
    lists = {"memory": plain(bench.memory), "stores": stores, "others": plain(bench.others), "streaming": plain(files)}
    found = {**asdict(bench), **lists, "read": bench.read}
    if expected:
        steps = {name: plain(rows) for name, rows in expected.stores.items()}
        found["run"] = {**asdict(expected), "stores": steps}
    return json.dumps(found, indent=2)


def bench_table(bench: Bench, files: Sequence[Measured] = (), expected: Forecast | None = None) -> Table:
    """Return one row for each thing that was measured; shares are of the best rate of reading."""
    title = f"{bench.elements:,} elements, {bench.candidates} candidates, {bench.device}, {bench.threads} threads"
    caption = "best of several; bytes: each that has to move, counted once"
    sections = {"memory": bench.memory, **bench.stores, "beside": bench.others, "files": files}
    if expected:
        sections |= {f"a step, {name}": rows for name, rows in expected.stores.items()}
        caption += f"\na step: what the run adds to forward and backward, {expected.elements:,} elements of a rank"
        if expected.measured < expected.elements:
            caption += f", project and combine scaled up from {expected.measured:,}"
        if files:
            caption += "; attach: at the speed of the files above, which are in the page cache"
        caption += "; a lower bound, since a run finds its caches cold"
    table = Table(title=title, caption=caption)
    for column in ("", "", "ms", "moved", "GB/s", "of read"):
        table.add_column(column, justify="right" if column else "left")
    for section, rows in sections.items():
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
