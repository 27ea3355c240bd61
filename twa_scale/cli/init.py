"""`twa-scale init`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from twa_scale.errors import OutputError

_DATA: dict[str, dict[str, Any]] = {
    "causal_lm": {"text": ["data/*.txt"]},
    "sequence_classification": {"train": "data/train.csv", "validation": "data/validation.csv"},
    "image_classification": {"train": "data/train.npz", "validation": "data/validation.npz"},
    "object_detection": {
        "image_size": 640,
        "train": {"images": "data/train", "annotations": "data/train.json"},
        "validation": {"images": "data/validation", "annotations": "data/validation.json"},
    },
}


def init(
    config: Annotated[Path, typer.Argument(help="The file to write.")] = Path("twa.yaml"),
    candidates: Annotated[str, typer.Option(help="Glob of the candidates, in training order.")] = "checkpoints/step-*",
    task: Annotated[
        str,
        typer.Option(
            help="`causal_lm`, `sequence_classification`, `image_classification`, `object_detection`, or your own."
        ),
    ] = "causal_lm",
    model: Annotated[str, typer.Option(help="Hugging Face directory, or `package.module:function`.")] = "model",
    output: Annotated[str, typer.Option(help="Directory of the run.")] = "runs/twa",
    steps: Annotated[
        int | None, typer.Option(min=1, help="Updates of the coefficients. Default: 100, or that of the recipe.")
    ] = None,
    recipe: Annotated[
        str | None, typer.Option(help="Named settings for a use: `tail`, `head` or `soup`; see `recipe` in the file.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing file.")] = False,
) -> None:
    """Write a commented configuration for `run`, and print the next commands.

    twa-scale init my-run.yaml --candidates 'checkpoints/step-*' --model checkpoints/step-100
    """
    from twa_scale.config.template import template

    data = _DATA.get(task, {})
    options = {"model": model, **data} if data else {}
    settings: dict[str, Any] = {"candidates": candidates, "task": {"name": task, **options}, "output": output}
    if recipe is not None:
        settings["recipe"] = recipe
    if steps is not None or recipe is None:
        settings["steps"] = steps or 100
    text = template(settings)
    try:
        with config.open("w" if overwrite else "x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise OutputError(f"{config} exists. Give another name, or --overwrite.") from None
    except OSError as error:
        raise OutputError(f"{config} cannot be written: {error.strerror}.") from None
    typer.echo(f"wrote {config}. Next: complete `task`, then `twa-scale plan {config}` and `twa-scale run {config}`.")
