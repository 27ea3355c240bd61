"""`twa-scale bench`."""

from pathlib import Path
from typing import Annotated

import typer

from twa_scale.cli.options import Overrides, Timeout
from twa_scale.cli.shared import drawn, joined
from twa_scale.config.kinds import StoreName
from twa_scale.errors import ConfigError


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

    from twa_scale.config import load_config
    from twa_scale.ranks import World
    from twa_scale.tools.bench import Work, bench_json, bench_table, forecast, parse_stores, planned_work
    from twa_scale.tools.planning import make_plan

    names: list[StoreName] = parse_stores(stores) if stores else []
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
    with joined(Path.cwd() / "bench", timeout) as (_, say):
        found, files = work.measure(threads, streaming)
        expected = forecast(plan, found, files) if plan else None
        if json:
            say(bench_json(found, files, expected))
        else:
            say(drawn(bench_table(found, files, expected)))
