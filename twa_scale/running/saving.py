"""Writes the snapshots of a window as candidates, and an average as a checkpoint."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from twa_scale.base.spans import Span, whole_tensor
from twa_scale.candidates.read_ahead import Progress
from twa_scale.engines import Engine
from twa_scale.errors import TwaError
from twa_scale.output import Files, check_dtype, check_files, parse_size, writing
from twa_scale.output.live_weights import may_be_mask, write_checkpoint
from twa_scale.output.model_card import with_card
from twa_scale.output.options import OutputOptions
from twa_scale.output.provenance import with_provenance
from twa_scale.output.publish import check_target, target_of
from twa_scale.output.snapshot_form import SnapshotForm, snapshot_form
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
    check_files(files)
    parse_size(max_shard_size)
    window.require_finite()
    return window


class Export:
    """An average that is to be written to a directory, after all checks that do not need its values. Collective.

    Args:
        engine: the engine of the model.
        pods: all ranks; the first pod writes.
        path: the directory.
        files: small files next to the weights, which the first rank reads.
        options: the dtype, the size of a file, and whether an earlier output is replaced.
        origin: returns the provenance of the average.

    Raises:
        ConfigError, OutputError, TwaError: on every rank.
    """

    def __init__(
        self,
        engine: Engine,
        pods: Pods,
        path: str | Path,
        files: Files,
        options: OutputOptions,
        origin: Callable[[], Mapping[str, Any]],
    ) -> None:
        self._engine = engine
        self._pods = pods
        self._path = path
        self._options = options
        with pods.agree():
            check_dtype(options.dtype)
            parse_size(options.max_shard_size)
            provenance = origin()
            if pods.rank == 0:
                check_target(target_of(path), 0, options.overwrite)
        self._form = snapshot_form(engine, pods, options.dtype, files)
        with pods.agree():
            small = self._form.carried.files_for(options.dtype)
            self._files = with_provenance(provenance, with_card(small, provenance))

    def write(self, progress: Progress | None) -> None:
        """Write the average, which the model shows. Collective. `progress` is as for `write_live`."""
        with self._pods.agree():
            if self._pods.number == 0:  # Pods hold the same weights.
                write_checkpoint(
                    self._engine,
                    self._path,
                    self._form,
                    max_shard_size=self._options.max_shard_size,
                    overwrite=self._options.overwrite,
                    progress=progress,
                    **self._files,
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
    form = snapshot_form(engine, pods, dtype, files)
    with pods.agree():
        if pods.number == 0:  # Pods hold the same weights, so one of them writes.
            for i, path in enumerate(paths):
                small = snapshot_files(window.steps[i], form.carried.files_for(dtype))
                _save(engine, window, i, path, form, max_shard_size, small)
    return paths


def _save(
    engine: Engine,
    window: Window,
    i: int,
    path: Path,
    form: SnapshotForm,
    max_shard_size: str | int,
    small: Mapping[str, Any],
) -> None:
    with writing(
        path,
        form.stored.specs,
        engine.shard_group,
        max_shard_size=form.carried.shard_size(max_shard_size),
        overwrite=True,
        base=form.carried.base,
        **small,
    ) as writer:
        window_spans = set(window.spans)

        def write(span: Span, values: torch.Tensor) -> None:
            for stored, part in form.stored.spans(span, values):
                writer.write(stored, part, allow_infinite=may_be_mask(engine, span.name))

        for span in engine.spans():
            if span.name not in form.stored.tensors:
                continue
            pieces = _combined(window, i, span) if span in window_spans else [(span, engine.live(span))]
            for piece, values in pieces:
                write(piece, values)
        if engine.shard_group.rank == 0:
            for name, buffer in engine.buffers().items():
                if name in form.stored.tensors:
                    write(whole_tensor(name, tuple(buffer.shape)), window.buffer(name, i).reshape(-1))


def _combined(window: Window, i: int, span: Span) -> Iterator[tuple[Span, torch.Tensor]]:
    """Yield the elements of a span of a snapshot in float32, in several parts, or at once for a strided span."""
    if span.run:
        yield span, torch.cat([values for _, values in window.snapshot(i, span)])
        return
    for part, values in window.snapshot(i, span):
        yield span.part(part.start, part.stop), values
