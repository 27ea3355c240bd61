"""Two pods over a slow link, against DistributedDataParallel over the same link. Needs root and iproute2.

    python examples/pods/run.py --json pods.json

Two network namespaces are two hosts, joined by a link of 100 Mbit/s and 20 ms (each way). A GPT of 22 million
parameters learns the averaging coefficients of four candidates on real text: once as two pods, which exchange only the
coefficients' gradient, and once under DDP over all ranks, which all-reduces the whole gradient and gathers the weights.
Both see the same batches, with and without the limits of the link, and both have to end where one process ends
that sees all batches. Nothing is left of the namespaces afterwards.
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from link import DEVICE, Shape, TwoHosts, two_hosts
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file
from worker import CONTEXT, SIZES

from twa_scale.run.tasks.byte_gpt import ByteGPT

HERE = Path(__file__).parent
PORT = 29400  # in a namespace of our own nobody else has it
NUM_CANDIDATES = 4


def main() -> None:
    """Run all of it and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=6, help="per run; the first is left out of the medians")
    parser.add_argument("--ranks-per-pod", type=int, default=1, help="with several, a pod is sharded by FSDP2")
    parser.add_argument("--megabits", type=float, default=100.0)
    parser.add_argument("--milliseconds", type=float, default=20.0)
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    arguments = parser.parse_args()
    shape = Shape(arguments.megabits, arguments.milliseconds)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # an exception: namespaces are taken down
    with tempfile.TemporaryDirectory(prefix="twa-pods-") as directory:
        results = compare(Path(directory), arguments.steps, arguments.ranks_per_pod, shape)
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2) + "\n")
    Console().print(table(results))


def compare(directory: Path, steps: int, ranks_per_pod: int, shape: Shape) -> dict[str, Any]:
    """Return what every run cost and how far its weights are from those of one process."""
    save_candidates(directory)
    ranks = 2 * ranks_per_pod
    common = [f"--candidates={directory}/step-*", f"--steps={steps}", f"--ranks={ranks}"]
    runs = []
    with two_hosts() as hosts:
        for link in (None, shape):
            hosts.shape(link)
            for mode in ("pods", "ddp"):
                out = directory / f"{mode}-{'slow' if link else 'free'}"
                run_on(hosts, ranks_per_pod, mode, *common, f"--out={out}")
                runs.append({"mode": mode, "slow": link is not None} | cost(out))
    single = directory / "alone"
    subprocess.run(worker("alone", *common, f"--out={single}"), check=True)
    for run in runs:
        run["error"] = distance(directory / f"{run['mode']}-{'slow' if run['slow'] else 'free'}", single)
    known = json.loads((single / "cost.json").read_text())
    moved = distance(single, directory / "mean")
    keys = {"parameters": known["parameters"], "coefficient_bytes": known["coefficient_bytes"], "moved": moved}
    link = {"megabits": shape.megabits, "milliseconds": shape.milliseconds}
    return {"candidates": NUM_CANDIDATES, "ranks_per_pod": ranks_per_pod, "link": link, **keys, "runs": runs}


def save_candidates(directory: Path) -> None:
    """Write candidates around one model, as training would leave them but for their use, and their mean."""
    torch.manual_seed(0)
    base = ByteGPT(context=CONTEXT, **SIZES).state_dict()
    mean = {name: torch.zeros_like(value) for name, value in base.items()}
    for i in range(NUM_CANDIDATES):
        state = {name: (value + 0.004 * torch.randn_like(value)).bfloat16() for name, value in base.items()}
        (directory / f"step-{i}").mkdir()
        save_file(state, directory / f"step-{i}" / "model.safetensors")
        for name, value in state.items():
            mean[name] += value.float() / NUM_CANDIDATES
    (directory / "mean").mkdir()
    save_file(mean, directory / "mean" / "model.safetensors")


def run_on(hosts: TwoHosts, ranks_per_pod: int, *words: str) -> None:
    """Run the worker on both hosts; when one rank fails the others are ended."""
    ranks = []
    for rank in range(2 * ranks_per_pod):
        variables = {"RANK": rank, "WORLD_SIZE": 2 * ranks_per_pod, "LOCAL_RANK": rank % ranks_per_pod}
        meeting = {"MASTER_ADDR": hosts.addresses[0], "MASTER_PORT": PORT, "GLOO_SOCKET_IFNAME": DEVICE}
        meeting["TORCH_CPP_LOG_LEVEL"] = "ERROR"  # it warns that addresses have no names
        environment = {**os.environ, **{key: str(value) for key, value in {**variables, **meeting}.items()}}
        ranks.append(subprocess.Popen(hosts.on(rank // ranks_per_pod, *worker(*words)), env=environment))
    try:
        failed = [process for process in ranks if process.wait()]
    finally:
        for process in ranks:
            process.kill()
    if failed:
        raise RuntimeError(f"{len(failed)} of {len(ranks)} ranks failed: {' '.join(words)}")


def worker(*words: str) -> list[str]:
    """Return the command of one rank."""
    return [sys.executable, str(HERE / "worker.py"), *words]


def cost(out: Path) -> dict[str, float]:
    """Return the median step of the first rank: seconds, and bytes that its host sent and received over the link."""
    steps = json.loads((out / "cost.json").read_text())["steps"][1:]
    medians = {key: statistics.median(step[key] for step in steps) for key in steps[0]}
    return {**medians, "fastest": min(step["seconds"] for step in steps)}


def distance(first: Path, second: Path) -> float:
    """Return the largest relative distance of a tensor, in norm."""
    first_weights, second_weights = (load_file(path / "model.safetensors") for path in (first, second))
    return max(
        float((first_weights[name] - second_weights[name]).norm() / second_weights[name].norm())
        for name in second_weights
    )


def table(results: dict[str, Any]) -> Table:
    """Return one row for each run."""
    link = f"{results['link']['megabits']:g} Mbit/s, {results['link']['milliseconds']:g} ms"
    title = f"{results['parameters'] / 1e6:.1f} M parameters, 2 pods of {results['ranks_per_pod']}"
    grid = Table(title=title, caption="error: largest relative distance of a tensor from one process on all batches")
    for column in ("", "link", "s / step", "fastest", "sent / step", "received / step", "error"):
        grid.add_column(column, justify="left" if column in ("", "link") else "right")
    for run in results["runs"]:
        sizes = [f"{run[key] / 1e3:,.1f} kB" for key in ("sent", "received")]
        row = (run["mode"], link if run["slow"] else "not limited", f"{run['seconds']:.2f}", f"{run['fastest']:.2f}")
        grid.add_row(*row, *sizes, f"{run['error']:.1e}")
    return grid


if __name__ == "__main__":
    main()
