"""Writes the snapshots of a window as candidates, and an average as a checkpoint."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from twa_scale.base.spans import Span, whole_tensor
from twa_scale.candidates.carry_over import BASE, CarriedFiles
from twa_scale.candidates.read_ahead import Progress
from twa_scale.engines import Engine
from twa_scale.errors import TwaError
from twa_scale.output import Files, check_dtype, check_files, parse_size, writing
from twa_scale.output.live_weights import may_be_mask, write_checkpoint
from twa_scale.output.model_card import with_card
from twa_scale.output.options import OutputOptions
from twa_scale.output.provenance import with_provenance
from twa_scale.output.publish import target_of
from twa_scale.output.snapshot_form import snapshot_form
from twa_scale.output.snapshots import snapshot_files
from twa_scale.ranks import Pods
from twa_scale.running.window import Window


def checked(window: Window | None, dtype: torch.dtype | None, files: Files, max_shard_size: str | int) -> Window:
    """Return the window, after a check of the arguments of `RunningAverages.save`. Not collective.

    Raises:
        ConfigError, TwaError: an argument is wrong, or there is no snapshot that can be written.
    """
    if window is None or not window.count:
        raise TwaError("save(): there is no snapshot; create RunningAverages with window={..}, and train.")
    check_dtype(dtype)
    check_files(files, BASE)
    parse_size(max_shard_size)
    window.require_finite()
    return window


def export(
    engine: Engine,
    pods: Pods,
    path: str | Path,
    carried: CarriedFiles,
    options: OutputOptions,
    origin: Mapping[str, Any],
    progress: Progress | None,
) -> None:
    """Write the average that the model shows. Collective.

    Args:
        engine: the engine of the model.
        pods: all ranks; the first pod writes.
        path: the directory to write.
        carried: has the small files next to the weights.
        options: the dtype, the size of a file, and whether an earlier output is replaced.
        origin: the provenance of the average.
        progress: called on every rank that writes, with the bytes just written and the total.
    """
    with pods.agree():
        form = snapshot_form(engine, options.dtype)
        files = with_card({**form.carried.files, **carried.files_for(options.dtype)}, origin)
        if pods.number == 0:  # Pods hold the same weights.
            write_checkpoint(
                engine,
                path,
                form,
                max_shard_size=options.max_shard_size,
                overwrite=options.overwrite,
                progress=progress,
                **with_provenance(origin, files),
            )


def save(
    engine: Engine,
    pods: Pods,
    window: Window,
    directory: str | Path,
    dtype: torch.dtype | None,
    files: Files,
    max_shard_size: str | int,
) -> list[Path]:
    """Write every snapshot as `directory/step-00000100` and so on, as `Snapshots` does. Collective.

    Returns:
        The directories, oldest first.
    """
    with pods.agree():
        root = target_of(directory)
    paths = [root / f"step-{step:08d}" for step in window.steps]
    with pods.agree():
        if pods.number == 0:  # Pods hold the same weights, so one of them writes.
            for i, path in enumerate(paths):
                _save(engine, window, i, path, dtype, files, max_shard_size)
    return paths


def _save(
    engine: Engine,
    window: Window,
    i: int,
    path: Path,
    dtype: torch.dtype | None,
    files: Files,
    max_shard_size: str | int,
) -> None:
    form = snapshot_form(engine, dtype)
    with writing(
        path,
        form.tensors.specs,
        engine.shard_group,
        max_shard_size=form.carried.shard_size(max_shard_size),
        overwrite=True,
        base=form.carried.base,
        **snapshot_files(window.steps[i], {**form.carried.files, **files}),
    ) as writer:
        window_spans = set(window.spans)

        def write(span: Span, values: torch.Tensor) -> None:
            for stored, part in form.tensors.spans(span, values):
                writer.write(stored, part, allow_infinite=may_be_mask(engine, span.name))

        for span in engine.spans():
            if span.name not in form.tensors.tensors:
                continue
            pieces = _combined(window, i, span) if span in window_spans else [(span, engine.live(span))]
            for piece, values in pieces:
                write(piece, values)
        if engine.shard_group.rank == 0:
            for name, buffer in engine.buffers().items():
                if name in form.tensors.tensors:
                    write(whole_tensor(name, tuple(buffer.shape)), window.buffer(name, i).reshape(-1))


def _combined(window: Window, i: int, span: Span) -> Iterator[tuple[Span, torch.Tensor]]:
    """Yield the elements of a span of a snapshot in float32, in several parts, or at once for a strided span."""
    if span.run:
        yield span, torch.cat([values for _, values in window.snapshot(i, span)])
        return
    for part, values in window.snapshot(i, span):
        yield span.part(part.start, part.stop), values
