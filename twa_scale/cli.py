"""The command line. Each command parses, calls one function of the library, and prints."""

import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console, RenderableType
from rich.markup import escape

from twa_scale.errors import ConfigError, TwaError
from twa_scale.notices import TwaWarning

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
Launcher = Literal["torchrun", "deepspeed", "slurm", "mpi"]
Out = Annotated[Path, typer.Option(help="Directory to write; it appears only when it is complete.")]
ShardSize = Annotated[str, typer.Option(help="Largest file: `5GB`, `512MiB`, ...")]
Dtype = Annotated[
    str | None,
    typer.Option(help="Type of the result: `float32`, `bfloat16`, `float16`; when not given, the candidates' widest."),
]
Ignore = Annotated[
    list[str] | None,
    typer.Option(help="Regular expression of tensors to leave out; may be given several times.", show_default=False),
]
WeightsKey = Annotated[
    str | None,
    typer.Option(help="Where the weights are in files that hold several sets: `model_ema`, `ema.state_dict`, ..."),
]
Timeout = Annotated[
    float | None,
    typer.Option(min=1, help="Under a launcher: seconds that ranks wait for each other; 600 when not given."),
]
CarryCode = Annotated[
    bool, typer.Option("--carry-code", help="Copy code (`*.py`) of the last candidate too; loaders may run it.")
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an earlier output.")]


@app.callback()
def entered(
    local_rank: Annotated[int | None, typer.Option("--local_rank", "--local-rank", hidden=True)] = None,
) -> None:
    """Learn how to average the checkpoints of models too large for one device."""
    del local_rank  # DeepSpeed's launcher gives it to every script


@app.command()
def run(
    config: Annotated[
        Path | None, typer.Argument(help="YAML or JSON file; see docs/configuration.md for every key.")
    ] = None,
    overrides: Overrides = None,
    deepspeed: Annotated[
        bool, typer.Option("--deepspeed", help="As scripts for DeepSpeed take it; says nothing.")
    ] = False,
    deepspeed_config: Annotated[
        Path | None, typer.Option("--deepspeed_config", help='DeepSpeed JSON with a "twa" block, in place of CONFIG.')
    ] = None,
) -> None:
    """Train the averaging coefficients as CONFIG says, then evaluate and export the average.

    Alone, or on every rank of a launcher:

        twa-scale run configs/my-run.yaml optimizer.lr=3e-3

        torchrun --nproc-per-node 8 -m twa_scale run configs/my-run.yaml

    Started again after a crash, it continues from the last saved state in `output`. SIGUSR1 or SIGTERM make it save its
    state after what it is at, a step, an evaluation or attach, and exit with code 75.
    """
    from twa_scale.config import load_config
    from twa_scale.training import run as run_training
    from twa_scale.training.report import Report
    from twa_scale.training.stopping import STOPPED, Stopped

    if deepspeed_config is not None:  # then all arguments are overrides
        config, overrides = deepspeed_config, [*([] if config is None else [str(config)]), *(overrides or [])]
    if config is None:
        raise ConfigError("give CONFIG, or --deepspeed_config FILE.")
    try:
        run_training(load_config(config, overrides), Report())
    except Stopped:
        raise typer.Exit(STOPPED) from None


@app.command()
def launch(
    config: Annotated[Path, typer.Argument(help="The file that `run` gets.")],
    overrides: Overrides = None,
    launcher: Annotated[Launcher, typer.Option("--with", help="What starts the ranks.")] = "torchrun",
    nodes: Annotated[int, typer.Option(min=1, help="Number of hosts.")] = 1,
    ranks_per_node: Annotated[int, typer.Option(min=1, help="Ranks on each of them: one for each GPU.")] = 1,
    host_file: Annotated[str | None, typer.Option(help="deepspeed, mpi: file that lists the hosts.")] = None,
    rdzv_endpoint: Annotated[str | None, typer.Option(help="torchrun: HOST:PORT where several nodes meet.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the command and stop.")] = False,
) -> None:
    """Check CONFIG, print the command that runs it on many ranks, and become that command.

    twa-scale launch --with torchrun configs/my-run.yaml --ranks-per-node 8

    twa-scale launch --with slurm configs/my-run.yaml --nodes 4 --ranks-per-node 8 --dry-run
    """
    from twa_scale.config import load_config
    from twa_scale.launch import Launch, execute, shown

    load_config(config, overrides)
    asked = Launch(str(config), overrides or [], nodes, ranks_per_node, host_file, rdzv_endpoint)
    command = asked.command(launcher)
    typer.echo(shown(command))
    if not dry_run:
        execute(command)


@app.command()
def plan(
    config: Annotated[Path, typer.Argument(help="The file that `run` will get.")],
    overrides: Overrides = None,
    ranks: Annotated[int, typer.Option(min=1, help="Number of ranks that share the model.")] = 1,
    memory: Annotated[
        str | None,
        typer.Option(help="What a rank has: `24GB`, `80GiB`, ...; when not given, what it would have on this machine."),
    ] = None,
    host_memory: Annotated[
        str | None,
        typer.Option(help="What a rank on a GPU has beside it, for `store_device: cpu`; when not given, likewise."),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say what `run` will need of each rank: memory, bytes read, bytes on the wire; and which stores fit.

    Starts nothing.
    """
    from twa_scale.config import load_config
    from twa_scale.planning import choose_store, make_plan, plan_json, plan_tables
    from twa_scale.writer import parse_size

    given: list[int | None] = []
    for option, size in (("--memory", memory), ("--host-memory", host_memory)):
        try:
            given.append(None if size is None else parse_size(size))
        except ConfigError as error:
            raise ConfigError(f"{option}: {error}") from None
    planned = make_plan(load_config(config, overrides), ranks)
    choices = choose_store(planned, *given)
    if json:
        typer.echo(plan_json(planned, choices))
    else:
        Console().print(plan_tables(planned, choices))


@app.command()
def inspect(
    candidates: Annotated[list[str], typer.Argument(help="Files, directories or globs, in training order.")],
    plot: Annotated[Path | None, typer.Option(help="Draw the cosine matrix of the deltas into this PNG.")] = None,
    ignore: Ignore = None,
    weights_key: WeightsKey = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    timeout: Timeout = None,
) -> None:
    """Show what candidates hold and how they lie to each other. Reads each byte once, in bounded memory.

    Under a launcher the ranks share the work, and rank 0 prints.
    """
    from twa_scale.inspection import inspect as inspect_candidates
    from twa_scale.inspection import inspection_json, inspection_table
    from twa_scale.plots import plot_cosines
    from twa_scale.sources import asked_for

    with _joined(Path.cwd() / "inspect", timeout) as (report, say):
        with report.bytes("reading candidates") as progress:
            inspection = inspect_candidates(candidates, progress, asked_for(ignore or [], weights_key))
        say(inspection_json(inspection) if json else _drawn(inspection_table(inspection)))
        if plot and report.active:
            plot_cosines(plot, inspection.cosines, inspection.labels)


@app.command()
def bench(
    config: Annotated[
        Path | None, typer.Argument(help="A file for `run`: measure for it, and say what its step costs.")
    ] = None,
    overrides: Overrides = None,
    ranks: Annotated[
        int | None, typer.Option(min=1, help="Number of ranks of CONFIG's run; those that measure when not given.")
    ] = None,
    elements: Annotated[
        int | None,
        typer.Option(min=1, help="Trained elements D of one rank: 10,000,000 when not given; with CONFIG, at most."),
    ] = None,
    candidates: Annotated[
        int | None, typer.Option(min=1, help="Number of candidates n: 16 when not given, or CONFIG's.")
    ] = None,
    stores: Annotated[
        str | None,
        typer.Option(help="Which, with commas between: `dense32,dense16,packed8,packed4` when not given, or CONFIG's."),
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads on a CPU; torch's number when not given.")] = None,
    kernels: Annotated[
        str | None, typer.Option(help="`auto`, `torch`, `numba` or `triton`: `auto` when not given, or CONFIG's.")
    ] = None,
    cuda: Annotated[bool, typer.Option("--cuda", help="Measure the GPU.")] = False,
    streaming: Annotated[
        Path | None, typer.Option(help="Measure reading and writing too, with files in a folder of this disk.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    timeout: Timeout = None,
) -> None:
    """Measure on this machine what a step costs with each store, against the speed of its memory.

    With CONFIG also what the average costs in a step of that run, on top of forward and backward. Under torchrun all
    ranks measure at once, and share the reduction; rank 0 prints.

    twa-scale bench configs/my-run.yaml store=packed4 --ranks 8
    """
    import torch

    from twa_scale.bench import Work, bench_json, bench_table, forecast, planned_work
    from twa_scale.config import load_config
    from twa_scale.planning import make_plan
    from twa_scale.ranks import World

    names = stores.split(",") if stores else []
    plan = None
    if config is None:
        if ranks is not None:
            raise ConfigError("--ranks: these are of the run of a CONFIG; give CONFIG, or leave it out.")
        names = names or ["dense32", "dense16", "packed8", "packed4"]
        device = torch.device("cuda" if cuda else "cpu")
        work = Work(names, elements or 10_000_000, candidates or 16, kernels or "auto", device)
    else:
        options = {"--candidates": candidates, "--kernels": kernels, "--cuda": cuda}
        if wrong := [option for option, value in options.items() if value]:
            raise ConfigError(
                f"{wrong[0]}: CONFIG says it; leave it out, or override that: `kernels=torch device=cuda`."
            )
        world, loaded = World.from_environment(), load_config(config, overrides)
        plan = make_plan(loaded, ranks or world.size)
        work = planned_work(plan, loaded, names, elements, world)
    with _joined(Path.cwd() / "bench", timeout) as (_, say):
        found, files = work.measure(threads, streaming)
        expected = forecast(plan, found, files) if plan else None
        if json:
            say(bench_json(found, files, expected))
        else:
            say(_drawn(bench_table(found, files, expected)))


@app.command()
def average(
    candidates: Annotated[
        list[str], typer.Argument(help="Files, directories or globs in training order, or each as PATH:WEIGHT.")
    ],
    out: Out,
    weights: Annotated[
        str | None,
        typer.Option(
            help="`uniform` (when not given); `ema:D`: candidate i of n has D^(n-i) over the sum of these; "
            "`ema-torch:D`, torch's EMA over the candidates: D^(n-1) for the first, (1-D) D^(n-i) for the others; "
            "`linear` or `minus-sqrt` (WSM's decay shapes); `first`, `last` or an index; or `0.5,0.3,0.2`.",
            show_default=False,
        ),
    ] = None,
    normalize: Annotated[
        bool, typer.Option("--normalize", help="Divide weights that do not sum to 1 by their sum.")
    ] = False,
    buffers: Annotated[
        str,
        typer.Option(
            help="Floating point buffers: `average` running statistics with the weights and take others from the last "
            "candidate; `mean`: average statistics uniformly; or take all from `first`, `last` or an index."
        ),
    ] = "average",
    ignore: Ignore = None,
    weights_key: WeightsKey = None,
    max_shard_size: ShardSize = "5GB",
    dtype: Dtype = None,
    carry_code: CarryCode = False,
    overwrite: Overwrite = False,
    timeout: Timeout = None,
) -> None:
    """Average candidates with fixed weights: streamed, in bounded memory, no model code needed.

    Under a launcher the ranks share the work.

    twa-scale average 'runs/a/step-*' --weights ema:0.9 --out merged

    twa-scale average runs/a:0.7 runs/b:0.3 --out merged

    twa-scale average runs/a:3 runs/b:1 --normalize --out merged
    """
    from twa_scale.merge import average_fixed

    with _joined(out, timeout) as (report, say), report.bytes("averaging") as progress:
        used = average_fixed(
            candidates,
            out,
            weights,
            normalize=normalize,
            buffers=buffers,
            ignore=ignore or [],
            weights_key=weights_key,
            max_shard_size=max_shard_size,
            dtype=dtype,
            carry_code=carry_code,
            overwrite=overwrite,
            progress=progress,
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
    carry_code: CarryCode = False,
    overwrite: Overwrite = False,
    timeout: Timeout = None,
) -> None:
    """Write the trained average of RUN from its coefficients and the candidates alone; no model code needed.

    The candidates must be where they were, unchanged. The result is the exact merge sum_i a_i w_i; `run` itself exports
    the live weights, which differ from it by the rounding of the store.
    """
    from twa_scale.merge import export_run

    with _joined(out, timeout) as (report, say), report.bytes("merging") as progress:
        n, step = export_run(
            run,
            out,
            max_shard_size=max_shard_size,
            dtype=dtype,
            carry_code=carry_code,
            overwrite=overwrite,
            progress=progress,
        )
    say(f"wrote the exact merge of {n} candidates with the coefficients of {step} to {out}")


def _drawn(table: RenderableType) -> str:
    """Return what a console of this width shows."""
    console = Console()
    with console.capture() as text:
        console.print(table)
    return text.get().rstrip()


@contextmanager
def _joined(out: Path, timeout: float | None) -> "Iterator[tuple[Report, Callable[[str], None]]]":
    """Share the work with the other ranks of the launcher, if there are any; rank 0 reports.

    SIGINT, SIGTERM and SIGHUP undo what is half done.
    """
    import torch

    from twa_scale.config import TIMEOUT
    from twa_scale.ranks import Ended, World, ended_by_signals
    from twa_scale.training.report import Report

    world = World.from_environment()
    try:
        with ended_by_signals(), world.joined(torch.device("cpu"), out.parent, timeout or TIMEOUT):
            yield Report(active=world.rank == 0), typer.echo if world.rank == 0 else lambda _: None
    except Ended as ended:
        typer.echo(f"stopped by {ended.signal}: nothing was written", err=True)
        raise


def main() -> None:
    """Run the command line; bad input ends with one message and exit code 2."""
    sys.path.append(str(Path.cwd()))  # as `python -m twa_scale` has it: tasks of one's own are found there
    try:
        with _notices():
            app(standalone_mode=True)
    except TwaError as error:
        _explain(error)
        sys.exit(2)


@contextmanager
def _notices() -> Iterator[None]:
    """Print each notice as one line, without the place in the code that Python adds to a warning."""

    def show(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
        if issubclass(category, TwaWarning):
            Console(stderr=True).print(f"note: {message}", markup=False, highlight=False, soft_wrap=True)
        else:
            usual(message, category, *where, **more)

    with warnings.catch_warnings():
        usual, warnings.showwarning = warnings.showwarning, show
        yield


def _explain(error: TwaError) -> None:
    """Print an error once: one rank speaks for all where all know; what is wrong with one node, only that can say."""
    import torch.distributed as dist

    from twa_scale.ranks import World

    try:
        world = World.from_environment()
    except ConfigError:
        world = World(0, 1, 0)
    # Before ranks have met all find the same fault in a configuration: one on each node says so.
    alone = world.local_rank == 0 or not isinstance(error, ConfigError) or dist.is_initialized()
    if world.rank == 0 or (alone and not error.agreed):
        kind = "bad configuration" if isinstance(error, ConfigError) else type(error).__name__
        where = "" if world.rank == 0 else f" (rank {world.rank})"
        text = f"[bold red]{kind}{where}:[/] {escape(str(error))}"
        Console(stderr=True).print(text, highlight=False, soft_wrap=True)
