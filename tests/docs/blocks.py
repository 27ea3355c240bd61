"""The code blocks of a Markdown page, and the comment above each that determines how it is tested.

    <!-- not run: REASON -->    the block is not executed
    <!-- run by: PATH -->       the test file PATH executes it
    <!-- file: NAME -->         the block is the content of the file NAME; later blocks use it
    <!-- run: CODE -->          Python code that is executed before the block

Without a comment a `python` block is executed, each line of an `sh` block is executed as a `twa-scale` command, and a
`yaml` block is read as the configuration of a run.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
KINDS = ("not run", "run by", "file", "run")

_MARKER = re.compile(r"^\s*<!-- (not run|run by|file|run): (.+) -->\s*$")
_FENCE = re.compile(r"^(\s*)```(\w*)")


@dataclass(frozen=True)
class Block:
    """One fenced block: its position, its language, its text without indentation, and its comment."""

    page: Path
    line: int
    language: str
    text: str
    kind: str = ""
    detail: str = ""

    @property
    def where(self) -> str:
        """Return the position for messages."""
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks_of(page: Path) -> Iterator[Block]:
    """Yield the blocks of a page in order."""
    lines = page.read_text(encoding="utf-8").splitlines()
    i = 0
    while i < len(lines):
        fence = _FENCE.match(lines[i])
        if fence is None:
            i += 1
            continue
        indent, start = len(fence[1]), i
        i += 1
        body: list[str] = []
        while not lines[i].strip().startswith("```"):
            body.append(lines[i][indent:])
            i += 1
        i += 1
        above = next((line for line in reversed(lines[:start]) if line.strip()), "")
        marker = _MARKER.match(above)
        yield Block(page, start + 1, fence[2], "\n".join(body) + "\n", *(marker.groups() if marker else ("", "")))


def commands_of(block: Block) -> list[str]:
    """Return the commands of a shell block without comments, with continued lines joined."""
    text = block.text.replace("\\\n", " ")
    lines = (re.sub(r"(^|\s)#.*", "", line).strip() for line in text.splitlines())
    return [" ".join(line.split()) for line in lines if line]
