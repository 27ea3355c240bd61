"""Repeat the quickstart with several seeds and write docs/results.md: `make results`."""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "results.md"
HEAD = """# Results

`make results` writes this page. It runs the steps of `make quickstart` once for each seed ({seeds}). A seed sets the
order of the training data and the initial weights. Figures are the mean over the seeds and, in parentheses, the lowest
and the highest.

Machine: {machine}{remark}. Date: {date}.

## Which average is best

A byte-level GPT of {parameters:,} parameters is trained for {steps} steps on the sources of Python's own library at a
constant rate. Averages use its last {keep} candidates, {every} steps apart. TWA has {extra} steps. Losses are on test
files that were not used before. Validation files were used to choose the decay of the EMA and the average from which
TWA starts.

{quality}

- `optimizer steps` counts every forward and backward pass over a batch of 32 sequences, including those of the run that
  made the candidates. Evaluations on validation files are not counted.
- `annealed` continues training from the last weights with a rate that falls linearly to zero. `TWA, then annealed`
  continues from the learned average with half of the rate.
- `decayed run` starts to decay the rate at 80 % of its steps. If the length of a run is not known in advance, this is
  an additional run.

{reading}

[Performance](performance.md) has the time of a step.
"""


def main() -> None:
    """Run the seeds and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("runs/seeds"))
    parser.add_argument("--page-only", action="store_true", help="write the page from runs that are there already")
    parser.add_argument("--remark", default="", help="what to say of the machine, such as what else it did")
    arguments = parser.parse_args()
    outs = [arguments.out / f"seed-{seed}" for seed in arguments.seeds]
    for seed, out in zip(arguments.seeds, outs, strict=True):
        if not arguments.page_only:
            command = [sys.executable, str(ROOT / "examples/quickstart/run.py"), f"--out={out}", f"--seed={seed}"]
            subprocess.run(command, check=True)
    PAGE.write_text(page(arguments.seeds, outs, arguments.remark))
    print(f"wrote {PAGE}")


def page(seeds: list[int], outs: list[Path], remark: str) -> str:
    """Return docs/results.md."""
    rows = [json.loads((out / "results.json").read_text()) for out in outs]
    facts = json.loads((outs[0] / "training.json").read_text())
    return HEAD.format(
        seeds=", ".join(map(str, seeds)),
        machine=machine(),
        remark=f", {remark}" if remark else "",
        date=time.strftime("%Y-%m-%d"),
        quality=quality(rows),
        reading=reading(rows),
        **{key: facts[key] for key in ("parameters", "steps", "extra", "keep", "every")},
    )


def quality(rows: list[list[dict[str, Any]]]) -> str:
    """Return the comparison of the methods as a Markdown table."""
    lines = [
        "| method | optimizer steps | test loss (nats/byte) | against the uniform average |",
        "| --- | ---: | ---: | ---: |",
    ]
    for method in zip(*rows, strict=True):
        losses = [row["loss"] for row in method]
        gains = [row["loss"] - loss_of(run, "uniform average") for row, run in zip(method, rows, strict=True)]
        lines.append(
            f"| {method[0]['method']} | {method[0]['steps']} | {spread(losses, '.4f')} | {spread(gains, '+.4f')} |"
        )
    return "\n".join(lines)


def reading(rows: list[list[dict[str, Any]]]) -> str:
    """Say in words who won, seed by seed, so that no sentence can outlive its numbers."""
    pairs = {"TWA": ("uniform average", "EMA, best of four"), "TWA, then annealed": ("annealed", "decayed run")}
    sentences = []
    for own_values, others in pairs.items():
        won = {other: sum(loss_of(run, own_values) < loss_of(run, other) for run in rows) for other in others}
        counts = " and ".join(f"than `{other}` in {count}" for other, count in won.items())
        sentences.append(f"`{own_values}` had a lower test loss {counts}")
    return f"Of {len(rows)} seeds, {'; '.join(sentences)}."


def loss_of(run: list[dict[str, Any]], method: str) -> float:
    """Return the test loss of a method."""
    return float(next(row["loss"] for row in run if row["method"] == method))


def spread(values: list[float], form: str) -> str:
    """Return "mean (lowest to highest)"."""
    return f"{statistics.mean(values):{form}} ({min(values):{form}} to {max(values):{form}})"


def machine() -> str:
    """Return the processor's name and the number of cores."""
    names = [
        line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    return f"{os.cpu_count()} cores of {names[0] if names else 'an unnamed processor'}"


if __name__ == "__main__":
    main()
