"""Run the examples of docs/trainers.md with shorter trainings."""

from typing import Any

from tests.docs.blocks import ROOT, blocks_of

SHORTER = {'"every": 100': '"every": 1', "learn_steps=200": "learn_steps=2", "10_000": "4"}


def run_example(library: str, names: dict[str, Any]) -> None:
    """Execute the blocks that import the integration of a library."""
    actual = [
        b for b in blocks_of(ROOT / "docs" / "trainers.md") if f"from twa_scale.integrations.{library} import" in b.text
    ]
    assert actual
    for block in actual:
        text = block.text
        for long, short in SHORTER.items():
            text = text.replace(long, short)
        exec(compile(text, block.where, "exec"), names)
