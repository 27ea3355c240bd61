"""The whole story on real text: train a small GPT with FSDP2, learn how to average its weights, train on, compare.

`make quickstart` runs this. Everything is written below runs/quickstart; `--seed` repeats it with other data orders.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from math import log2
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

HERE = Path(__file__).parent
CONFIG = HERE.parents[1] / "configs" / "quickstart.yaml"
KEEP, EVERY = 20, 5
SIZES: dict[str, list[str]] = {
    "small": [],
    "large": [f"task.model.byte_gpt.{size}" for size in ("n_layer=7", "n_head=12", "d_model=768")],  # 50 million
}
RATES = {"small": 2e-3, "large": 6e-4}
RUN = "twa-packed4"

console = Console()


def main() -> None:
    """Run the stages one after the other and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/quickstart"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=600, help="steps of training at a constant rate")
    parser.add_argument("--extra", type=int, default=30, help="steps of TWA, and of the annealing after it")
    parser.add_argument("--batches", type=int, default=20, help="batches of each evaluation on a rank")
    parser.add_argument(
        "--device",
        choices=["cpu", "cuda"],
        default="cpu",
        help="cpu: two ranks; cuda: one for each GPU, up to a power of two",
    )
    parser.add_argument("--size", choices=SIZES, default="small", help="of the model; large: 50 M parameters, for GPUs")
    arguments = parser.parse_args()
    ranks = 2
    if arguments.device == "cuda":
        gpus = torch.cuda.device_count()
        if not gpus:
            parser.error("--device cuda: torch sees no GPU")
        ranks = 2 ** int(log2(gpus))  # a batch is divided over the ranks
    named = f"{ranks} ranks with FSDP2" if ranks > 1 else "one rank"
    out, batches = arguments.out, arguments.batches
    task = [f"seed={arguments.seed}", f"device={arguments.device}", *SIZES[arguments.size]]
    start = time.perf_counter()
    for stale in ("candidates", "methods", RUN):
        shutil.rmtree(out / stale, ignore_errors=True)
    out.mkdir(parents=True, exist_ok=True)
    stage(f"1/3  training a byte-level GPT on {named}, and averaging its weights from memory")
    torchrun(
        ranks, HERE / "train.py", CONFIG, *task, f"--out={out}", f"--steps={arguments.steps}",
        f"--extra={arguments.extra}", f"--keep={KEEP}", f"--every={EVERY}", f"--batches={batches}",
        f"--lr={RATES[arguments.size]}",
    )  # fmt: skip
    stage("2/3  the same from candidate files and a configuration, with deltas in 4 bits")
    own = [f"candidates={out}/candidates/step-*", f"output={out / RUN}", f"steps={arguments.extra}"]
    torchrun(ranks, "-m", "twa_scale", "run", CONFIG, *task, *own, f"evaluate_batches={batches}")
    stage("3/3  comparing on test files that were not used before")
    table(out, compare(out, ranks, task, arguments))
    console.print(f"[dim]{time.perf_counter() - start:.0f} s in all[/]")


def compare(out: Path, ranks: int, task: list[str], arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Evaluate every method once on the test split."""
    steps, extra, batches = arguments.steps, arguments.extra, arguments.batches
    methods = {
        "last weights": (out / "methods/last", steps),
        "uniform average": (out / "methods/uniform", steps),
        "EMA, best of four": (out / "methods/ema", steps),
        "TWA": (out / "methods/twa", steps + extra),
        "TWA, 4 bits, from files": (out / RUN / "average", steps + extra),
        "annealed": (out / "methods/annealed", steps + 2 * extra),
        "decayed run": (out / "methods/decayed", steps + 2 * extra),
        "TWA, then annealed": (out / "methods/twa-annealed", steps + 2 * extra),
    }
    result, weights = out / "test.json", [f"--weights={path}" for path, _ in methods.values()]
    torchrun(
        ranks, "-m", "twa_scale", "evaluate", CONFIG, *task, f"--batches={2 * batches}", f"--out={result}", *weights
    )
    metrics = json.loads(result.read_text())
    rows = [{"method": name, "steps": steps, **metrics[str(path)]} for name, (path, steps) in methods.items()]
    (out / "results.json").write_text(json.dumps(rows, indent=2) + "\n")
    return rows


def table(out: Path, rows: list[dict[str, Any]]) -> None:
    """Print the comparison."""
    result = Table(title="Held-out test split")
    for column in ("method", "optimizer steps", "loss (nats/byte)", "bits/byte"):
        result.add_column(column, justify="left" if column == "method" else "right")
    for row in rows:
        result.add_row(row["method"], str(row["steps"]), f"{row['loss']:.4f}", f"{row['bits_per_byte']:.4f}")
    console.print(result)
    console.print(f"The learned average is in {out}/methods/twa, its picture in\n{out}/{RUN}/coefficients.png.")


def stage(title: str) -> None:
    """Announce a stage."""
    console.rule(f"[bold]{title}", align="left")


def torchrun(ranks: int, *arguments: object) -> None:
    """Start `ranks` on this machine with the free port that torchrun finds."""
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    subprocess.run([*command, *map(str, arguments)], check=True, env=environment)


if __name__ == "__main__":
    main()
