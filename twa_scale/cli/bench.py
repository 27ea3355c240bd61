"""`twa-scale bench`."""

from pathlib import Path
from typing import Annotated

import typer

from twa_scale.cli.options import Overrides, Timeout
from twa_scale.cli.shared import joined, rendered
from twa_scale.config.kinds import StoreName
from twa_scale.errors import ConfigError


def bench(
    config: Annotated[
        Path | None, typer.Argument(help="A configuration of `run`: measure its sizes and estimate its step.")
    ] = None,
    overrides: Overrides = None,
    ranks: Annotated[
        int | None, typer.Option(min=1, help="Number of ranks of CONFIG's run. Default: the ranks of this command.")
    ] = None,
    elements: Annotated[
        int | None,
        typer.Option(min=1, help="Trained elements D of one rank. Default: 10,000,000. With CONFIG, an upper limit."),
    ] = None,
    candidates: Annotated[
        int | None, typer.Option(min=1, help="Number of candidates n. Default: 16, or that of CONFIG.")
    ] = None,
    stores: Annotated[
        str | None,
        typer.Option(help="Stores, comma-separated. Default: `dense32,dense16,packed8,packed4`, or that of CONFIG."),
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads on a CPU. Default: that of torch.")] = None,
    kernels: Annotated[
        str | None, typer.Option(help="`auto`, `torch`, `numba` or `triton`. Default: `auto`, or that of CONFIG.")
    ] = None,
    row_length: Annotated[
        int | None,
        typer.Option(min=1, help="Also measure `groups: tensor+row`, with output rows of this number of elements."),
    ] = None,
    cuda: Annotated[bool, typer.Option("--cuda", help="Measure the GPU.")] = False,
    streaming: Annotated[
        Path | None, typer.Option(help="Also measure reading and writing, with files in this folder.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    timeout: Timeout = None,
) -> None:
    """Measure the cost of a step with each store on this machine, relative to the speed of its memory.

    With CONFIG, also estimate what the average adds to forward and backward in a step of that run. Under torchrun all
    ranks measure at the same time and take part in the reduction; rank 0 prints.

    twa-scale bench configs/my-run.yaml store=packed4 --ranks 8
    """
    import torch

    from twa_scale.config import load_config
    from twa_scale.ranks import World
    from twa_scale.tools.bench import Work, bench_json, bench_table, forecast, parse_stores, planned_work
    from twa_scale.tools.planning import make_plan

    names: list[StoreName] = parse_stores(stores) if stores else []
    plan = None
    if config is None:
        if ranks is not None:
            raise ConfigError("--ranks: is the number of ranks of CONFIG's run; give CONFIG, or leave it out.")
        names = names or ["dense32", "dense16", "packed8", "packed4"]
        device = torch.device("cuda" if cuda else "cpu")
        work = Work(names, elements or 10_000_000, candidates or 16, kernels or "auto", device)
    else:
        options = {"--candidates": candidates, "--kernels": kernels, "--cuda": cuda}
        if wrong := [option for option, value in options.items() if value]:
            raise ConfigError(
                f"{wrong[0]}: is set by CONFIG; leave it out, or override the setting: `kernels=torch device=cuda`."
            )
        world, loaded = World.from_environment(), load_config(config, overrides)
        plan = make_plan(loaded, ranks or world.size)
        work = planned_work(plan, loaded, names, elements, world)
    with joined(Path.cwd() / "bench", timeout) as (_, echo):
        measured, files = work.measure(threads, streaming, row_length)
        expected = forecast(plan, measured, files) if plan else None
        if json:
            echo(bench_json(measured, files, expected))
        else:
            echo(rendered(bench_table(measured, files, expected)))
