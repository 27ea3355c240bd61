"""The command line. Each command parses, calls one function of the library, and prints."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape

from twa_scale.errors import ConfigError, TwaError

if TYPE_CHECKING:
    from twa_scale.training.report import Report

app = typer.Typer(
    help="Learn how to average the checkpoints of models too large for one device.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        help="Settings that replace those of the file: `optimizer.lr=3e-3 groups=block`.", show_default=False
    ),
]
Out = Annotated[Path, typer.Option(help="Directory to write; it appears only when it is complete.")]
ShardSize = Annotated[str, typer.Option(help="Largest file: `5GB`, `512MiB`, ...")]
Dtype = Annotated[
    str | None,
    typer.Option(help="Type of the result: `float32`, `bfloat16`, `float16`; the candidates' own when not given."),
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an earlier output.")]


@app.command()
def run(
    config: Annotated[Path, typer.Argument(help="YAML or JSON file; see docs/configuration.md for every key.")],
    overrides: Overrides = None,
) -> None:
    """Train the averaging coefficients as CONFIG says, then evaluate and export the average.

    Alone, or on every rank of a launcher:

        twa-scale run configs/my-run.yaml optimizer.lr=3e-3

        torchrun --nproc-per-node 8 -m twa_scale run configs/my-run.yaml

    Started again after a crash, it continues from the last saved state in `output`.
    """
    from twa_scale.config import load_config
    from twa_scale.training import run as run_training
    from twa_scale.training.report import Report

    run_training(load_config(config, overrides), Report())


@app.command()
def plan(
    config: Annotated[Path, typer.Argument(help="The file that `run` will get.")],
    overrides: Overrides = None,
    ranks: Annotated[int, typer.Option(min=1, help="Number of ranks that share the model.")] = 1,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say what `run` will need of each rank: memory, bytes read, bytes on the wire. Starts nothing."""
    from twa_scale.config import load_config
    from twa_scale.plan import make_plan
    from twa_scale.tables import plan_json, plan_table

    loaded = load_config(config, overrides)
    planned = make_plan(loaded, ranks)
    if json:
        typer.echo(plan_json(planned))
    else:
        Console().print(plan_table(planned, ranks))


@app.command()
def inspect(
    candidates: Annotated[list[str], typer.Argument(help="Files, directories or globs, in training order.")],
    plot: Annotated[Path | None, typer.Option(help="Draw the cosine matrix of the deltas into this PNG.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show what candidates hold and how they lie to each other. Reads each byte once, in bounded memory."""
    from twa_scale.inspection import inspect as inspect_candidates
    from twa_scale.plots import plot_cosines
    from twa_scale.tables import inspection_json, inspection_table
    from twa_scale.training.report import Report

    with Report().bytes("reading candidates") as progress:
        inspection = inspect_candidates(candidates, progress)
    if json:
        typer.echo(inspection_json(inspection))
    else:
        Console().print(inspection_table(inspection))
    if plot:
        plot_cosines(plot, inspection.cosines, inspection.labels)


@app.command()
def average(
    candidates: Annotated[
        list[str], typer.Argument(help="Files, directories or globs in training order, or each as PATH:WEIGHT.")
    ],
    out: Out,
    weights: Annotated[
        str,
        typer.Option(help="`uniform`, `ema:0.9`, `linear` or `minus-sqrt` (WSM's decay shapes), `first`, `last`."),
    ] = "uniform",
    max_shard_size: ShardSize = "5GB",
    dtype: Dtype = None,
    overwrite: Overwrite = False,
) -> None:
    """Average candidates with fixed weights: streamed, in bounded memory, no model code needed.

    Under torchrun the ranks share the work.

    twa-scale average 'runs/a/step-*' --weights ema:0.9 --out merged

    twa-scale average runs/a:0.7 runs/b:0.3 --out merged
    """
    from twa_scale.merge import average_fixed

    with _joined() as (report, say), report.bytes("averaging") as progress:
        used = average_fixed(
            candidates, out, weights, max_shard_size=max_shard_size, dtype=dtype, overwrite=overwrite, progress=progress
        )
    for label, weight in used:
        say(f"{weight:10.6f}  {label}")
    say(f"wrote the average of {len(used)} candidates to {out}")


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="Output directory of `twa-scale run`.")],
    out: Out,
    max_shard_size: ShardSize = "5GB",
    dtype: Dtype = None,
    overwrite: Overwrite = False,
) -> None:
    """Write the trained average of RUN from its coefficients and the candidates alone; no model code needed.

    The candidates must be where they were, unchanged. The result is the exact merge sum_i a_i w_i; `run` itself exports
    the live weights, which differ from it by the rounding of the store.
    """
    from twa_scale.merge import export_run

    with _joined() as (report, say), report.bytes("merging") as progress:
        n, step = export_run(
            run, out, max_shard_size=max_shard_size, dtype=dtype, overwrite=overwrite, progress=progress
        )
    say(f"wrote the exact merge of {n} candidates with the coefficients of step {step} to {out}")


@contextmanager
def _joined() -> "Iterator[tuple[Report, Callable[[str], None]]]":
    """Share the work with the other ranks of torchrun, if there are any; rank 0 reports."""
    import torch

    from twa_scale.training.report import Report
    from twa_scale.world import World

    world = World.from_environment()
    with world.joined(torch.device("cpu")):
        yield Report(active=world.rank == 0), typer.echo if world.rank == 0 else lambda _: None


def main() -> None:
    """Run the command line; bad input ends with one message and exit code 2."""
    sys.path.append(str(Path.cwd()))  # as `python -m twa_scale` has it: tasks of one's own are found there
    try:
        app(standalone_mode=True)
    except TwaError as error:
        rank = os.environ.get("RANK", "0")
        # One speaks for all where all know; what is wrong with one node or rank, only that one can say.
        alone = not isinstance(error, ConfigError) or os.environ.get("LOCAL_RANK", "0") == "0"
        if rank == "0" or (alone and not error.agreed):
            kind = "bad configuration" if isinstance(error, ConfigError) else type(error).__name__
            where = "" if rank == "0" else f" (rank {rank})"
            text = f"[bold red]{kind}{where}:[/] {escape(str(error))}"
            Console(stderr=True).print(text, highlight=False, soft_wrap=True)
        sys.exit(2)
