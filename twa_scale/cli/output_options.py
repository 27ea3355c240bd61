"""The options that all commands that write weights share."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import wraps
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
            help="Dtype of the result: `float32`, `bfloat16`, `float16`. Default: the widest of the candidates."
        ),
    ] = None
    carry_code: Annotated[
        bool, typer.Option("--carry-code", help="Also copy code (`*.py`) of the last candidate. Loaders may run it.")
    ] = False
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier output.")] = False

    @property
    def options(self) -> dict[str, Any]:
        """All options except `out`, by the names of the arguments of `average_fixed` and `export_run`."""
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name != "out"}


def with_output(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options of `Output` to a command, which receives them as its keyword argument `output`."""
    own, shared = inspect.signature(command), inspect.signature(Output).parameters
    others = [parameter for parameter in own.parameters.values() if parameter.name != "output"]
    # Keyword-only parameters come last. typer reads the order and the types of options from the signature.
    parameters = sorted([*others, *shared.values()], key=lambda parameter: parameter.kind)

    @wraps(command)
    def run(**given: Any) -> None:
        output = Output(**{name: given.pop(name) for name in shared})
        command(**given, output=output)

    run.__signature__ = own.replace(parameters=parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run
