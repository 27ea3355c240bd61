"""`twa-scale evaluate`."""

import json
from math import isfinite
from pathlib import Path
from typing import Annotated

import typer

from twa_scale.cli.options import Overrides
from twa_scale.errors import ConfigError


def evaluate(
    config: Annotated[Path, typer.Argument(help="The configuration of `run`.")],
    overrides: Overrides = None,
    weights: Annotated[
        list[str] | None,
        typer.Option(
            help="File, directory or pattern of weights, in any format of candidates. Can be repeated. Default: the "
            "last candidate and the average of the finished run.",
            show_default=False,
        ),
    ] = None,
    split: Annotated[str, typer.Option(help="`train`, `validation` or `test`.")] = "test",
    batches: Annotated[
        int | None, typer.Option(min=1, help="Largest number of batches. Default: the whole split.")
    ] = None,
    recalibrate: Annotated[
        bool, typer.Option("--recalibrate", help="Compute BatchNorm statistics from training data, as runs do.")
    ] = False,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Also write the metrics to this JSON file.")] = None,
) -> None:
    """Evaluate weights in files on a split, with the model and the data of CONFIG.

    Run it in one process, or on every rank of a launcher:

        twa-scale evaluate configs/my-run.yaml

        torchrun --nproc-per-node 8 -m twa_scale evaluate configs/my-run.yaml --weights 'runs/a/step-*' -o test.json

    Each rank reads its own part of the weights. Do this once, at the end, because choices by the test split are biased.
    """
    from twa_scale.cli.shared import rendered
    from twa_scale.config import load_config
    from twa_scale.output.publish import replace_file
    from twa_scale.ranks import World
    from twa_scale.run.evaluation import evaluate_weights
    from twa_scale.run.progress import Report, metrics_table

    for key in ("evaluate_split", "evaluate_batches"):
        if any(override.partition("=")[0].strip() == key for override in overrides or []):
            raise ConfigError(f"{key}: has no effect on this command. Give --{key.removeprefix('evaluate_')}.")
    settings = load_config(config, overrides)
    settings = settings.model_copy(update={"evaluate_split": split, "evaluate_batches": batches})
    if out:
        _check_out(out)
    rank = World.from_environment().rank  # read while the variables of the launcher are set

    def write(measured: dict[str, dict[str, float]]) -> None:
        if rank == 0 and out:
            replace_file(out, (json.dumps(_finite(measured), indent=2) + "\n").encode())

    measured = evaluate_weights(settings, weights or (), Report(), recalibrate=recalibrate, callback=write)
    if rank == 0:
        typer.echo(rendered(metrics_table(f"Metrics on the {split} split", list(measured.items()))))


def _check_out(out: Path) -> None:
    """Check that only metrics of an earlier command are replaced.

    Raises:
        ConfigError: names the file.
    """
    from twa_scale.base.inputs import read_json_mapping

    if not out.exists():
        return
    fix = "It would be replaced: give another --out."
    content = read_json_mapping(out, ConfigError, fix)
    rows = [list(row.values()) for row in content.values() if isinstance(row, dict)]
    if len(rows) != len(content) or not all(isinstance(x, float | int | None) for row in rows for x in row):
        raise ConfigError(f"{out}: does not contain metrics. {fix}")


def _finite(measured: dict[str, dict[str, float]]) -> dict[str, dict[str, float | None]]:
    """Return the metrics with None instead of values that are not finite, which JSON does not have."""
    return {path: {k: v if isfinite(v) else None for k, v in metrics.items()} for path, metrics in measured.items()}
