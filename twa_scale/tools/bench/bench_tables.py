"""The output of `bench`: a table, or JSON."""

import json
from collections.abc import Sequence
from dataclasses import asdict

from rich.table import Table

from twa_scale.base.sizes import size_text
from twa_scale.tools.bench.planned import Forecast
from twa_scale.tools.bench.stores import Bench
from twa_scale.tools.bench.timing import Measured


def bench_json(bench: Bench, files: Sequence[Measured] = (), expected: Forecast | None = None) -> str:
    """Return the measurements as JSON (seconds, bytes, bytes per second), with the estimate of a planned run."""

    def plain(rows: Sequence[Measured]) -> list[dict[str, object]]:
        return [{**asdict(row), "rate": row.rate} for row in rows]

    stores = {name: plain(rows) for name, rows in bench.stores.items()}
    lists = {"memory": plain(bench.memory), "stores": stores, "others": plain(bench.others), "streaming": plain(files)}
    result = {**asdict(bench), **lists, "read": bench.read}
    if expected:
        steps = {name: plain(rows) for name, rows in expected.stores.items()}
        result["run"] = {**asdict(expected), "stores": steps}
    return json.dumps(result, indent=2)


def bench_table(bench: Bench, files: Sequence[Measured] = (), expected: Forecast | None = None) -> Table:
    """Return a table with one row for each measurement. Shares are relative to the best rate of reading."""
    title = f"{bench.elements:,} elements, {bench.candidates} candidates, {bench.device}, {bench.threads} threads"
    caption = "best of several calls; moved: the bytes that must be moved, each counted once"
    sections: dict[str, Sequence[Measured]] = {"memory": bench.memory}
    sections |= {str(name): rows for name, rows in bench.stores.items()}
    sections |= {"other": bench.others, "files": files}
    if expected:
        sections |= {f"a step, {name}": rows for name, rows in expected.stores.items()}
        caption += f"\na step: the cost on top of forward and backward for {expected.elements:,} elements of a rank"
        if expected.measured < expected.elements:
            caption += f", project and combine scaled up from {expected.measured:,}"
        if files:
            caption += "; attach: at the rate of the files above, which are in the page cache"
        caption += "; a lower bound, because caches are cold in a run"
    table = Table(title=title, caption=caption)
    for column in ("", "", "ms", "moved", "GB/s", "of read"):
        table.add_column(column, justify="right" if column else "left")
    for section, rows in sections.items():
        for i, row in enumerate(rows):
            share = f"{row.rate / bench.read:.0%}"
            cells = (f"{1e3 * row.seconds:.3f}", size_text(row.nbytes), f"{row.rate / 1e9:.1f}", share)
            table.add_row(section if i == 0 else "", row.name, *cells)
        table.add_section()
    return table
