"""The options that all commands that write weights share."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any

import typer


@dataclass(frozen=True, kw_only=True)
class Output:
    """The options of the output of a command."""

    out: Annotated[Path, typer.Option(help="Directory to write. It appears when it is complete.")]
    max_shard_size: Annotated[str, typer.Option(help="Largest file: `5GB`, `512MiB`, ...")] = "5GB"
    dtype: Annotated[
        str | None,
        typer.Option(
            help="Dtype of the result: `float32`, `bfloat16`, `float16`. Default: the narrowest for all candidates; "
            "with `--format same` the dtypes of the last candidate, and no others."
        ),
    ] = None
    format: Annotated[
        str,
        typer.Option(
            help="`hf`: safetensors; `pt`: a file of torch.save; `dcp`: torch.distributed.checkpoint; `same`: the form "
            "of the last candidate with the state of its training, to resume from the average."
        ),
    ] = "hf"
    carry_code: Annotated[
        bool, typer.Option("--carry-code", help="Also copy code (`*.py`) of the last candidate. Loaders may run it.")
    ] = False
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier output.")] = False

    @property
    def options(self) -> dict[str, Any]:
        """All options except `out`, by the names of the arguments of `average_fixed` and `export_run`."""
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name != "out"}
