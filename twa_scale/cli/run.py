"""`twa-scale run`."""

from pathlib import Path
from typing import Annotated

import typer

from twa_scale.cli.options import Overrides
from twa_scale.errors import ConfigError


def run(
    config: Annotated[
        Path | None, typer.Argument(help="YAML or JSON file; docs/configuration.md describes all keys.")
    ] = None,
    overrides: Overrides = None,
    print_config: Annotated[
        bool, typer.Option("--print-config", help="Print all settings that apply, as YAML, and do not run.")
    ] = False,
    deepspeed: Annotated[
        bool, typer.Option("--deepspeed", help="Ignored; DeepSpeed's launcher passes it to scripts.")
    ] = False,
    deepspeed_config: Annotated[
        Path | None, typer.Option("--deepspeed_config", help='DeepSpeed JSON with a "twa" block, instead of CONFIG.')
    ] = None,
) -> None:
    """Train the averaging coefficients according to CONFIG, then evaluate and export the average.

    Run it in one process, or on every rank of a launcher:

        twa-scale run configs/my-run.yaml optimizer.lr=3e-3

        torchrun --nproc-per-node 8 -m twa_scale run configs/my-run.yaml

    When started again after a crash, it continues from the last saved state in `output`. On SIGUSR1 or SIGTERM it
    finishes the current step, evaluation or attach, saves its state, and exits with code 75.
    """
    from twa_scale.config import load_config
    from twa_scale.config.template import resolved

    if deepspeed_config is not None:  # all positional arguments are overrides
        config, overrides = deepspeed_config, [*([] if config is None else [str(config)]), *(overrides or [])]
    if config is None:
        raise ConfigError("give CONFIG, or --deepspeed_config FILE.")
    settings = load_config(config, overrides)
    if print_config:
        typer.echo(resolved(settings), nl=False)
        return
    from twa_scale.run import run as run_training  # imports torch, which --print-config does not need
    from twa_scale.run.progress import Report
    from twa_scale.run.stopping import STOPPED, Stopped

    try:
        run_training(settings, Report())
    except Stopped:
        raise typer.Exit(STOPPED) from None
