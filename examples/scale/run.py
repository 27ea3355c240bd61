"""A billion parameters, 16 candidates and two ranks on one machine of 24 GiB, with packed deltas beside the shards.

`make scale-run` runs this. Candidates are made up and written, their average is trained for a few steps on real text
and exported. The export is compared with a merge of the same files that shares no code with it, and the memory with the
estimate of `twa-scale plan`. The memory holds 16 candidates of 4 bits, or `--candidates 64 --bits 1`.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from math import isqrt
from pathlib import Path
from typing import Any

import psutil
from check import check
from random_llama import SIZES, link_candidates, llama, tensors, write_candidates
from rich.console import Console
from rich.table import Table

from twa_scale.kernels.packed_rows import BLOCKS

CONFIG = Path(__file__).parents[2] / "configs" / "scale.yaml"
SPARE = 2 << 30  # bytes of memory and disk that are left to others

console = Console()


def main() -> None:
    """Run the phases one after the other and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="1b")
    parser.add_argument("--scratch", type=Path, default=Path("runs/scale"), help="directory on a disk with room")
    parser.add_argument("--candidates", type=int, default=16, help="number of candidates")
    parser.add_argument(
        "--written",
        type=int,
        help="number of candidates that are written; the others are new combinations of their files. Default: all",
    )
    parser.add_argument(
        "--bits", type=int, choices=sorted(BLOCKS), default=4, help="bits of a delta: store packed8 to packed1"
    )
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", action="store_true", help="keep candidates and merges, not only the results")
    arguments = parser.parse_args()
    n = arguments.candidates
    written = n if arguments.written is None else min(arguments.written, n)
    if written < 1 or written**2 < n:
        parser.error(f"--written {written}: {n} candidates need at least {isqrt(n - 1) + 1}, whose files are combined")
    root: Path = arguments.scratch / arguments.size
    directory = root / f"candidates-{n}-{written}-{arguments.seed}"
    try:
        results = scale_run(root, directory, written, arguments)
        (root / "results.json").write_text(json.dumps(results, indent=2) + "\n")
        for table in tables(results):
            console.print(table)
    finally:
        if not arguments.keep:
            for large in (directory, root / "run/average", root / "exact"):
                shutil.rmtree(large, ignore_errors=True)


def scale_run(root: Path, directory: Path, written: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Return what every phase cost and what the check found."""
    n, bits, ranks, seed = arguments.candidates, arguments.bits, arguments.ranks, arguments.seed
    for stale in ("run", "exact"):
        shutil.rmtree(root / stale, ignore_errors=True)
    directory.mkdir(parents=True, exist_ok=True)
    config = llama(arguments.size)
    nbytes = sum(spec.nbytes for spec in tensors(config))
    seconds: dict[str, float] = {}
    if len(list(directory.glob("step-*"))) < n:  # else an earlier run with --keep left them
        require("disk", (written + 2) * nbytes, shutil.disk_usage(root).free)
        with phase(f"writing {written} candidates of {nbytes / 1e9:.2f} GB", "write", seconds):
            write_candidates(config, directory, written, seed)
            link_candidates(directory, written, n)
    candidates = sorted(directory.glob("step-*"))
    settings = [
        CONFIG, f"candidates={directory}/step-*", f"task.model={candidates[0]}", f"output={root}/run",
        f"steps={arguments.steps}", f"seed={seed}",
        f"store=packed{bits}", "coding=center",  # the candidates are independent
    ]  # fmt: skip
    with phase("plan", "plan", seconds):
        plan = json.loads(python("-m", "twa_scale", "plan", *settings, f"--ranks={ranks}", "--json"))
    require("memory", ranks * plan["peak"], psutil.virtual_memory().available)
    with phase(f"training the coefficients on {ranks} ranks", "run", seconds):
        launcher = ("-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}")
        python(*launcher, "-m", "twa_scale", "run", *settings)
    with phase("merging the candidates with the same coefficients", "merge", seconds):
        python("-m", "twa_scale", "export", root / "run", "--out", root / "exact")
    with phase("checking what was exported", "check", seconds):
        checked = check(candidates, root / "run", root / "exact", bits)
    summary = json.loads((root / "run/summary.json").read_text())
    records = [json.loads(line) for line in (root / "run/metrics.jsonl").read_text().splitlines()]
    trained = [record for record in records if "seconds" in record]
    step = sum(record["seconds"] for record in trained) / len(trained)
    return {
        "parameters": plan["trained_elements"],
        "candidates": n,
        "written": written,
        "bits": bits,
        "candidate_bytes": nbytes,
        "ranks": ranks,
        "losses": [record["loss"] for record in trained],
        "plan": plan,
        "summary": summary,
        "seconds": seconds | {"attach": summary["attach_seconds"], "step": step, "export": summary["export_seconds"]},
        "check": checked,
    }


def tables(results: dict[str, Any]) -> Iterator[Table]:
    """Yield memory, time, and the check."""
    parameters, n, ranks = results["parameters"], results["candidates"], results["ranks"]
    plan, summary, seconds = results["plan"], results["summary"], results["seconds"]
    store = f"packed{results['bits']}"
    title = f"{parameters / 1e9:.3f} G parameters, {n} candidates, {ranks} ranks of FSDP2, {store}"
    memory = Table(title=title, caption="bytes of one rank; weights, center and gradients are float32")
    for column in ("memory", "GB"):
        memory.add_column(column, justify="left" if column == "memory" else "right")
    for name, nbytes in {**plan["memory"], **plan["step"]}.items():
        memory.add_row(name, f"{nbytes / 1e9:.2f}")
    memory.add_section()
    memory.add_row("peak, as planned", f"{plan['peak'] / 1e9:.2f}")
    for rank, peak in enumerate(summary["peak_resident_bytes_per_rank"]):
        memory.add_row(f"peak, rank {rank} ({peak / plan['peak'] - 1:+.1%})", f"{peak / 1e9:.2f}")
    memory.add_row("published form: its basis alone, all ranks", f"{4 * n * parameters / 1e9:.1f}")
    yield memory

    candidate_bytes = results["candidate_bytes"]
    times = Table(title="Time")
    for column in ("phase", "s", "GB", "GB/s"):
        times.add_column(column, justify="left" if column == "phase" else "right")
    for key, name, nbytes in [
        ("write", "make and write the candidates", results["written"] * candidate_bytes),
        ("attach", "attach: read, once, and pack", sum(summary["bytes_read_per_rank"])),
        ("step", "a step, forward and backward included", 0),
        ("export", "export", candidate_bytes),
        ("merge", "exact merge, one process", n * candidate_bytes),
        ("check", "check, one process", (n + 2) * candidate_bytes),
    ]:
        if key not in seconds:
            continue
        rate = (f"{nbytes / 1e9:.1f}", f"{nbytes / seconds[key] / 1e9:.2f}") if nbytes else ("", "")
        times.add_row(name, f"{seconds[key]:.1f}", *rate)
    for part, cost in summary["cost"].items():
        rate = (
            (f"{cost['bytes'] / 1e9:.1f}", f"{cost['bytes'] / cost['seconds'] / 1e9:.2f}")
            if cost["bytes"]
            else ("",) * 2
        )
        times.add_row(f"of a step: {part}, rank 0", f"{cost['seconds']:.2f}", *rate)
    yield times

    check_results = results["check"]
    checked = Table(title="The exported file against a merge in float64")
    checked.add_column("norms")
    checked.add_column("", justify="right")
    for name, value in {
        "merged - center, of the center": f"{check_results['moved']:.2%}",
        "exported - merged, of that": f"{check_results['error']:.2%}",
        f"  predicted from {store}'s cosine of {check_results['cosine']:.4f}": f"{check_results['predicted']:.2%}",
        "  of it, rounding to bfloat16": f"{check_results['rounding']:.2%}",
        "  measured / predicted, by tensor": " to ".join(f"{ratio:.3f}" for ratio in check_results["tensors"]),
        "`twa-scale export` - merged, of rounding alone": " to ".join(
            f"{ratio:.6f}" for ratio in check_results["exact"]
        ),
    }.items():
        checked.add_row(name, value)
    checked.add_section()
    losses = results["losses"]
    checked.add_row(f"training loss, steps 1 to {len(losses)}", ", ".join(f"{loss:.3f}" for loss in losses))
    yield checked


@contextmanager
def phase(title: str, key: str, seconds: dict[str, float]) -> Iterator[None]:
    """Announce a phase and keep its time."""
    console.rule(f"[bold]{title}", align="left")
    start = time.perf_counter()
    yield
    seconds[key] = time.perf_counter() - start


def require(resource: str, needed: int, free: int) -> None:
    """Leave when there is too little room: a run that fails after an hour, or takes others with it, helps nobody."""
    if needed + SPARE > free:
        sys.exit(
            f"{resource}: {needed / 1e9:.1f} GB are needed beside {SPARE / 1e9:.1f} GB that are left to others, and "
            f"{free / 1e9:.1f} GB are free. Make room, or give another --scratch, a smaller --size or fewer "
            "--candidates."
        )


def python(*arguments: object) -> str:
    """Run this Python and return what it prints; its progress is seen."""
    command = [sys.executable, *map(str, arguments)]
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    return subprocess.run(command, check=True, env=environment, stdout=subprocess.PIPE, text=True).stdout


if __name__ == "__main__":
    main()
