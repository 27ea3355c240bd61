"""Arguments and options that several commands take."""

from pathlib import Path
from typing import Annotated

import typer

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
