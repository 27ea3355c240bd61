"""The output of `twa-scale plan`: tables or JSON."""

import json
from collections.abc import Mapping
from dataclasses import asdict

from rich.console import Group
from rich.table import Table
from rich.text import Text

from twa_scale.base.names import plural
from twa_scale.base.sizes import size_text
from twa_scale.tools.planning.choices import Choices
from twa_scale.tools.planning.plan import Plan


def plan_json(plan: Plan, choices: Choices) -> str:
    """Return the plan, its peak and the stores as JSON, with sizes in bytes."""
    stores = {**asdict(choices), "most_exact": choices.most_exact, "verdict": choices.verdict}
    return json.dumps({**asdict(plan), "peak": plan.peak, "stores": stores}, indent=2)


def plan_tables(plan: Plan, choices: Choices) -> Group:
    """Return tables of the plan and of all stores, and a line with the store that fits."""
    verdict = Text(choices.verdict, "" if choices.configured_choice.fits else "bold red")
    return Group(_plan_table(plan), _stores_table(choices), verdict)


def averages_table(bytes_by_part: Mapping[str, int], ranks: int) -> Table:
    """Return a table of the memory of running averages, by description."""
    table = Table(title=f"running averages in training, {ranks} {plural(ranks, 'rank')}")
    table.add_column("per rank, in addition to the weights")
    table.add_column("bytes", justify="right")
    for name, nbytes in {**bytes_by_part, "sum": sum(bytes_by_part.values())}.items():
        table.add_row(name, size_text(nbytes))
    return table


def _stores_table(choices: Choices) -> Table:
    caption = f"memory of a rank: {size_text(choices.memory)}, {_source(choices.assumed, '--memory')}"
    if choices.configured_choice.host:
        source = _source(choices.host_assumed, "--host-memory")
        caption += f"; host memory of a rank: {size_text(choices.host_memory)}, {source}"
    table = Table(title="stores, per rank", caption=caption)
    for column in ("store", "bytes", "peak", "moved in a step", "fits"):
        table.add_column(column, justify="left" if column in ("store", "fits") else "right")
    for choice in choices.stores:
        is_configured = choice.store == choices.configured
        fits = f"no: {choice.obstacle}" if choice.obstacle else "yes" if choice.fits else "no"
        if choice.page_cache:
            fits += f", with {size_text(choice.page_cache)} of page cache"
        if choice.host:
            fits += f", with {size_text(choice.host)} of host memory"
        sizes = (size_text(size) for size in (choice.nbytes, choice.peak, sum(choice.moved.values())))
        table.add_row(
            choice.store + (", configured" if is_configured else ""),
            *sizes,
            fits,
            style="bold" if is_configured else "",
        )
    return table


def _source(assumed: str, option: str) -> str:
    return f"assumed: {assumed}; set it with {option}" if assumed else "as given"


def _plan_table(plan: Plan) -> Table:
    title = (
        f"{plan.num_candidates} candidates, {plan.trained_elements:,} trained elements in {plan.num_groups} groups, "
        f"{plan.ranks} {plural(plan.ranks, 'rank')}"
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
            table.add_row(section if i == 0 else "", name, size_text(nbytes))
        table.add_section()
    return table
