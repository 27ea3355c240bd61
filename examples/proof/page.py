"""The page docs/proof.md, of which the tables between comments are generated."""

from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "proof.md"


def updated(page: str, task: str, tables: str) -> str:
    """Return the page with new tables of a task, which stand between two comments."""
    begin, end = f"<!-- tables of {task} -->\n", f"<!-- end of {task} -->\n"
    before, found, rest = page.partition(begin)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise SystemExit(f"{PAGE.name}: no lines {begin.strip()} and {end.strip()}")
    return f"{before}{begin}\n{tables}\n{end}{after}"
