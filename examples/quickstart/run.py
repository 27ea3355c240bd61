"""The whole story on real text: train a small GPT under FSDP2, learn how to average its candidates, compare.

`make quickstart` runs this. Everything is written below runs/quickstart; `--seed` repeats it with other data orders.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

HERE = Path(__file__).parent
CONFIG = HERE.parents[1] / "configs" / "quickstart.yaml"
STEPS, TWA_STEPS = 800, 20
CANDIDATES, EVERY = 10, 10
RANKS = 2
RUNS = {
    "twa-train": ("on training data", ["split=train"]),
    "twa-validation": ("on validation data", ["split=validation"]),
    "twa-packed4": ("on training data, from deltas of 4 bits", ["split=train", "store=packed4"]),
}

console = Console()


def main() -> None:
    """Run the stages one after the other and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/quickstart"))
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    start = time.perf_counter()
    out: Path = arguments.out
    for stale in ("candidates", "baselines", *RUNS):
        shutil.rmtree(out / stale, ignore_errors=True)
    seed = f"seed={arguments.seed}"
    stage(f"1/6  training a byte-level GPT with FSDP2 on {RANKS} ranks, on the sources of Python's own library")
    torchrun(
        HERE / "pretrain.py", CONFIG, seed, f"--out={out}", f"--steps={STEPS}", f"--budget={STEPS + TWA_STEPS}",
        f"--candidates={CANDIDATES}", f"--every={EVERY}",
    )  # fmt: skip
    candidates = f"candidates={out}/candidates/step-*"
    for number, (name, (what, settings)) in enumerate(RUNS.items(), 2):
        stage(f"{number}/6  learning the coefficients of {CANDIDATES} candidates {what}")
        torchrun("-m", "twa_scale", "run", CONFIG, candidates, f"output={out / name}", *settings, seed)
    stage("5/6  the uniform average, streamed from the same candidates")
    twa_scale("inspect", f"{out}/candidates/step-*", "--plot", out / "cosines.png")
    twa_scale("average", f"{out}/candidates/step-*", "--out", out / "baselines/uniform")
    stage("6/6  comparing on test files that nothing has seen")
    results = compare(out)
    table(out, results)
    console.print(f"[dim]{time.perf_counter() - start:.0f} s in all[/]")


def compare(out: Path) -> list[dict[str, object]]:
    """Choose the EMA on validation data, then evaluate every method once on the test split."""
    emas = sorted((out / "baselines").glob("ema-*"))
    on_validation = evaluate(out, "validation", emas)
    ema = min(emas, key=lambda path: on_validation[str(path)]["loss"])
    last = max((out / "candidates").iterdir())
    methods = {
        "last candidate": (last, STEPS),
        "uniform average": (out / "baselines/uniform", STEPS),
        f"EMA (decay {ema.name.removeprefix('ema-')})": (ema, STEPS),
        "decayed run": (out / "baselines/decayed", STEPS + TWA_STEPS),
        "TWA-t": (out / "twa-train/average", STEPS + TWA_STEPS),
        "TWA-v": (out / "twa-validation/average", STEPS + TWA_STEPS),
        "TWA-t, packed4": (out / "twa-packed4/average", STEPS + TWA_STEPS),
    }
    metrics = evaluate(out, "test", [path for path, _ in methods.values()])
    rows = [{"method": name, "steps": steps, **metrics[str(path)]} for name, (path, steps) in methods.items()]
    (out / "results.json").write_text(json.dumps(rows, indent=2) + "\n")
    return rows


def table(out: Path, rows: list[dict[str, object]]) -> None:
    """Print the comparison."""
    result = Table(title="Held-out test split")
    for column in ("method", "optimizer steps", "loss (nats/byte)", "bits/byte"):
        result.add_column(column, justify="left" if column == "method" else "right")
    for row in rows:
        result.add_row(row["method"], str(row["steps"]), f"{row['loss']:.4f}", f"{row['bits_per_byte']:.4f}")
    console.print(result)
    console.print(
        f"TWA's {TWA_STEPS} steps train {CANDIDATES} coefficients per tensor; its average is in "
        f"{out}/twa-train/average,\n"
        f"its picture in {out}/twa-train/coefficients.png. The decayed run had the steps of training and TWA together."
    )


def evaluate(out: Path, split: str, paths: list[Path]) -> dict[str, dict[str, float]]:
    """Return the metrics of each set of weights, by the name of its directory."""
    result = out / f"{split}.json"
    torchrun(
        HERE.parent / "evaluate.py",
        CONFIG,
        f"--split={split}",
        f"--result={result}",
        "--batches=40",
        "--weights",
        *paths,
    )
    return json.loads(result.read_text())


def stage(title: str) -> None:
    """Announce a stage."""
    console.rule(f"[bold]{title}", align="left")


def torchrun(*arguments: object) -> None:
    """Start ranks on this machine with the free port that torchrun finds."""
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={RANKS}"]
    subprocess.run([*command, *map(str, arguments)], check=True, env=environment)


def twa_scale(*arguments: object) -> None:
    """Run the command line in one process."""
    subprocess.run([sys.executable, "-m", "twa_scale", *map(str, arguments)], check=True)


if __name__ == "__main__":
    main()
