"""A soup of fine-tunings with real pretrained weights: MiniLM on sentences of film reviews.

`make soup` runs this. Every ingredient has another data order and learning rate; twa_scale learns their coefficients on
the validation split, and the test split, which nothing has seen, compares ways to choose.
"""

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[2]))
from examples.soup.model_and_data import unpack_model, write_splits

HERE = Path(__file__).parent
CONFIG = HERE.parents[1] / "configs" / "soup.yaml"
RATES = [2e-5, 5e-5, 1e-4]

console = Console()


def main() -> None:
    """Fine-tune, average in several ways, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sentences", type=Path, required=True, help="source archive of vaderSentiment 3.3.2")
    parser.add_argument("--out", type=Path, default=Path("runs/soup"))
    parser.add_argument("--ingredients", type=int, default=6)
    parser.add_argument("--steps", type=int, default=100, help="of each fine-tuning")
    parser.add_argument("--epochs", type=float, default=3, help="of twa_scale over the validation split")
    parser.add_argument("--batches", type=int, help="of each evaluation; the whole split when not given")
    arguments = parser.parse_args()
    start = time.perf_counter()
    out: Path = arguments.out
    model = unpack_model(out / "pretrained")
    data = write_splits(arguments.sentences, out / "data")
    for stale in ("finetune", "baselines", "twa"):
        shutil.rmtree(out / stale, ignore_errors=True)
    settings = [
        f"task.model={model}", "task.max_length=32",
        *(f"task.{split}={path}" for split, path in data.items()),
        f"candidates={out}/finetune/*", f"output={out}/twa", f"epochs={arguments.epochs}",
    ]  # fmt: skip
    for i in range(arguments.ingredients):
        python(
            HERE / "finetune.py", CONFIG, *settings, f"--model={model}", f"--seed={i}", f"--lr={RATES[i % 3]}",
            f"--steps={arguments.steps}", f"--out={out}/finetune/run-{i}",
        )  # fmt: skip
    ingredients = sorted((out / "finetune").iterdir())
    overrides = [f"task.model={ingredients[0]}", f"evaluate_batches={arguments.batches or 'null'}", "compare=false"]
    python("-m", "twa_scale", "run", CONFIG, *settings, *overrides)
    average(ingredients, out / "baselines/uniform")
    on_validation = evaluate(out, settings, "validation", arguments.batches, ingredients)
    ranked = sorted(ingredients, key=lambda path: on_validation[str(path)]["loss"])
    greedy = greedy_soup(out, settings, arguments.batches, ranked)
    methods = {
        "best single (by validation)": ranked[0],
        "uniform soup": out / "baselines/uniform",
        "greedy soup": greedy,
        "TWA-v": out / "twa/average",
    }
    metrics = evaluate(out, settings, "test", arguments.batches, list(methods.values()))
    rows = [{"method": name, **metrics[str(path)]} for name, path in methods.items()]
    (out / "results.json").write_text(json.dumps(rows, indent=2) + "\n")
    table(rows)
    console.print(f"[dim]{time.perf_counter() - start:.0f} s in all[/]")


def greedy_soup(out: Path, settings: list[str], batches: int | None, ranked: list[Path]) -> Path:
    """Add ingredients from the best on while the loss on validation data falls (Wortsman et al., 2022)."""
    kept, best, loss = [ranked[0]], ranked[0], None
    for i, candidate in enumerate(ranked):
        trial = out / f"baselines/greedy-{i}"
        average([*kept, candidate] if i else kept, trial)
        value = evaluate(out, settings, "validation", batches, [trial])[str(trial)]["loss"]
        if loss is None or value < loss:
            kept, best, loss = [*kept, candidate] if i else kept, trial, value
    return best


def average(paths: list[Path], out: Path) -> None:
    """Average with equal weights."""
    python("-m", "twa_scale", "average", *paths, "--out", out)


def evaluate(
    out: Path, settings: list[str], split: str, batches: int | None, paths: list[Path]
) -> dict[str, dict[str, float]]:
    """Return the metrics of each directory."""
    result = out / f"{split}.json"
    limit = [f"--batches={batches}"] if batches else []
    weights = [f"--weights={path}" for path in paths]
    python("-m", "twa_scale", "evaluate", CONFIG, *settings, f"--split={split}", f"--out={result}", *limit, *weights)
    metrics: dict[str, dict[str, float]] = json.loads(result.read_text())
    return metrics


def table(rows: list[dict[str, Any]]) -> None:
    """Print the comparison."""
    result = Table(title="Test sentences")
    for column in ("method", "accuracy", "loss (nats)"):
        result.add_column(column, justify="left" if column == "method" else "right")
    for row in rows:
        result.add_row(row["method"], f"{100 * row['accuracy']:.2f} %", f"{row['loss']:.4f}")
    console.print(result)


def python(*arguments: object) -> None:
    """Run a script with this Python."""
    subprocess.run([sys.executable, *map(str, arguments)], check=True)


if __name__ == "__main__":
    main()
