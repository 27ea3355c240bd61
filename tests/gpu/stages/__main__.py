"""Run stages: `python -m tests.gpu.stages [--tiny] [--device cpu] [--out DIR] [STAGE ..]`; `--list` names them.

Each row is appended to DIR/rows.jsonl when it is measured, so that a stage that is stopped loses only its later rows.
`--table` writes the rows of DIR as a table and as DIR/results.json.
"""

import argparse
import json
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from dataclasses import asdict
from importlib import import_module
from pathlib import Path

STAGES = {
    "machine": (60, "machine.run"),
    "kernels": (60, "correctness.run"),
    "bandwidth": (90, "bandwidth.run"),
    "update": (60, "update.run"),
    "waits": (50, "waits.run"),
    "sharded": (80, "sharded.run"),
    "llama-1b": (80, "llama.one_billion"),
    "overlap": (60, "overlap.run"),
    "memory": (70, "memory.run"),
    "bf16": (40, "bf16.run"),
    "two-ranks": (90, "two_ranks.run"),
    "quickstart": (60, "quickstart.run"),
    "llama-7b": (90, "llama.seven_billion"),
    "tests": (120, "pytests.run"),
}
"""By name, the most important ones first: the time limit in seconds, and the function that yields the rows."""
CORRECTNESS = ("kernels", "waits", "sharded", "bf16", "two-ranks", "tests")
"""Stages that fail if a row is not as expected. In other stages, expected values are predictions."""
ROWS, RESULTS, TABLE = "rows.jsonl", "results.json", "table.md"
SKIPPED = "no accelerator: skipped"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stages", nargs="*", metavar="STAGE", help="default: all")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tiny", action="store_true", help="run all code on small data")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"))
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--table", action="store_true")
    arguments = parser.parse_args()
    if unknown := [name for name in arguments.stages if name not in STAGES]:
        parser.error(f"no stage {unknown[0]!r}; there are {', '.join(STAGES)}")
    if arguments.list:
        print("\n".join(f"{name} {seconds}" for name, (seconds, _) in STAGES.items()))
        return 0
    arguments.out.mkdir(parents=True, exist_ok=True)
    if arguments.table:
        write_table(arguments.out)
        return 0
    done = [run(name, arguments.device, arguments.out, tiny=arguments.tiny) for name in arguments.stages or STAGES]
    return 0 if all(done) else 1


def run(name: str, device: str, out: Path, *, tiny: bool) -> bool:
    """Run a stage, and return whether it completed without a problem. An exception becomes a row."""
    start, cpu = time.perf_counter(), time.process_time()
    passed = True
    try:
        for row in _rows(name, device, tiny):
            _add(out, name, row)
            passed &= name not in CORRECTNESS or row["ok"] is not False
    except Exception as error:
        traceback.print_exc()
        first_line = str(error).strip().partition("\n")[0]
        message = f"{type(error).__name__}: {first_line[:200]}"
        _add(out, name, {"name": "ended by an error", "measured": message, "ok": False})
        return False
    finally:
        taken = f"{time.perf_counter() - start:.1f} s, {time.process_time() - cpu:.1f} s of CPU"
        print(f"== {name}: {taken}", flush=True)
    return passed


def _rows(name: str, device: str, tiny: bool) -> Iterator[dict[str, object]]:
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        yield {"name": SKIPPED, "measured": "", "ok": None}
        return
    from tests.gpu.stages.setup import Setup

    module, function = STAGES[name][1].split(".")
    target = torch.device("cuda", 0) if device == "cuda" else torch.device("cpu")
    with tempfile.TemporaryDirectory(prefix="twa-scale-gpu-") as scratch:
        setup = Setup(target, tiny, Path(scratch))
        for row in getattr(import_module(f"tests.gpu.stages.{module}"), function)(setup):
            yield asdict(row)


def _add(out: Path, stage: str, row: dict[str, object]) -> None:
    with (out / ROWS).open("a") as file:
        file.write(json.dumps({"stage": stage, **row}) + "\n")
    print(f"{stage}: {row['name']}: {row['measured']} {row.get('expected') or ''}", flush=True)


def write_table(out: Path) -> None:
    """Write and print the rows as a table for docs/performance.md, and as JSON."""
    path = out / ROWS
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    (out / RESULTS).write_text(json.dumps(rows, indent=2) + "\n")
    verdict = {True: "yes", False: "**no**", None: ""}
    lines = ["| stage | measurement | measured | expected | as expected |", "| --- | --- | --- | --- | --- |"]
    for row in rows:
        cells = [row["stage"], row["name"], row["measured"], row.get("expected") or "", verdict[row["ok"]]]
        lines.append("| " + " | ".join(str(cell).replace("|", "/").replace("\n", " ") for cell in cells) + " |")
    (out / TABLE).write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    sys.exit(main())
