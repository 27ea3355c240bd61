"""How exactly stores of few bits hold the candidates of a run, in deltas and in increments; what training sees of it.

Give it directories that `run.py` or `seeds.py` has filled, one for each seed:

    python examples/quickstart/stores.py runs/seeds/seed-*
    python examples/quickstart/stores.py runs/seeds/seed-* --train

The first reads the candidates and prints the errors, in seconds. With `--train` the average is trained from every
store, too; runs that have finished are kept, so a command that was interrupted goes on where it was.
"""

import argparse
import json
import statistics
import sys
from itertools import product
from pathlib import Path

import torch

import twa_scale
from twa_scale.config import load_config
from twa_scale.run.tasks import build_task

sys.path.insert(0, str(Path(__file__).parent))
from run import CONFIG, torchrun

BITS, CODINGS = (8, 4, 2, 1), ("center", "increments")
STORES = {f"packed{bits}, {coding}": (f"packed{bits}", coding) for bits, coding in product(BITS, CODINGS)}


def main() -> None:
    """Print one table, or two."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", help="directories with candidates, one for each seed")
    parser.add_argument("--train", action="store_true", help="train from every store, and compare on the test split")
    arguments = parser.parse_args()
    print(errors_table(arguments.runs))
    if arguments.train:
        print()
        print(losses_table([trained(run) for run in arguments.runs]))


def errors_table(runs: list[Path]) -> str:
    """Return the errors of candidates, in units of their deltas, as a Markdown table."""
    model = build_task(load_config(CONFIG).task).model()
    lines = ["| store | coding: center | coding: increments |", "| --- | ---: | ---: |"]
    for bits in BITS:
        cells = [spread([e for run in runs for e in errors(model, run, bits, coding)], ".3f") for coding in CODINGS]
        lines.append(f"| `packed{bits}` | {' | '.join(cells)} |")
    return "\n".join(lines)


def errors(model: torch.nn.Module, run: Path, bits: int, coding: str) -> tuple[float, ...]:
    """Return the error of each candidate of a run."""
    average = twa_scale.attach(model, f"{run}/candidates/step-*", {"store": f"packed{bits}", "coding": coding})
    average.close()
    assert average.rounding is not None
    return average.rounding.errors


def trained(run: Path) -> dict[str, float]:
    """Return the test loss of the average that is trained from each store; what is there already is not made again."""
    outputs = {"dense32": run / "stores/dense32"} | {name: run / f"stores/{name.replace(', ', '-')}" for name in STORES}
    for name, output in outputs.items():
        if not (output / "summary.json").exists():
            store, coding = STORES.get(name, (name, "auto"))
            settings = ["split=train", f"store={store}", f"coding={coding}", "keep=last"]
            candidates = f"candidates={run}/candidates/step-*"
            torchrun("-m", "twa_scale", "run", CONFIG, candidates, f"output={output}", *settings)
    result = run / "stores/test.json"
    if not result.exists():
        weights = [f"--weights={output}/average" for output in outputs.values()]
        torchrun("-m", "twa_scale", "evaluate", CONFIG, "--split=test", "--batches=40", f"--out={result}", *weights)
    losses = json.loads(result.read_text())
    return {name: losses[str(output / "average")]["loss"] for name, output in outputs.items()}


def losses_table(runs: list[dict[str, float]]) -> str:
    """Return the test losses as a Markdown table."""
    lines = ["| store | test loss (nats/byte) | against dense32 |", "| --- | ---: | ---: |"]
    for name in runs[0]:
        gains = [run[name] - run["dense32"] for run in runs]
        lines.append(f"| {name} | {spread([run[name] for run in runs], '.4f')} | {spread(gains, '+.4f')} |")
    return "\n".join(lines)


def spread(values: list[float], form: str) -> str:
    """Return "mean (lowest to highest)"."""
    return f"{statistics.mean(values):{form}} ({min(values):{form}} to {max(values):{form}})"


if __name__ == "__main__":
    main()
