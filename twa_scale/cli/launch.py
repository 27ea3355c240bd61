"""`twa-scale launch`."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from twa_scale.cli.options import Overrides

Launcher = Literal["torchrun", "deepspeed", "slurm", "mpi"]


def launch(
    config: Annotated[Path, typer.Argument(help="The configuration of `run`.")],
    overrides: Overrides = None,
    launcher: Annotated[Launcher, typer.Option("--with", help="The launcher that starts the ranks.")] = "torchrun",
    nodes: Annotated[int, typer.Option(min=1, help="Number of hosts.")] = 1,
    ranks_per_node: Annotated[int, typer.Option(min=1, help="Number of ranks per host: one for each GPU.")] = 1,
    host_file: Annotated[str | None, typer.Option(help="deepspeed, mpi: the file that lists the hosts.")] = None,
    rdzv_endpoint: Annotated[
        str | None, typer.Option(help="torchrun: HOST:PORT of the rendezvous of several nodes.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the command without running it.")] = False,
) -> None:
    """Check CONFIG, print the command that runs it on many ranks, and execute that command.

    twa-scale launch --with torchrun configs/my-run.yaml --ranks-per-node 8

    twa-scale launch --with slurm configs/my-run.yaml --nodes 4 --ranks-per-node 8 --dry-run
    """
    from twa_scale.config import load_config
    from twa_scale.tools.launch import Launch, execute, shown

    load_config(config, overrides)
    job = Launch(str(config), overrides or [], nodes, ranks_per_node, host_file, rdzv_endpoint)
    command = job.command(launcher)
    typer.echo(shown(command))
    if not dry_run:
        execute(command)
