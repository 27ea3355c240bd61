"""Writing the live weights of a model: each rank writes its own spans, without gathering."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from twa_scale.base.spans import Span, whole_tensor
from twa_scale.candidates.buffers import is_statistic
from twa_scale.candidates.read_ahead import Progress
from twa_scale.engines import Engine
from twa_scale.output.ranks_writer import Writer, writing
from twa_scale.output.small_files import Files
from twa_scale.output.snapshot_form import SnapshotForm
from twa_scale.output.stored_form import StoredForm


def write_checkpoint(
    engine: Engine,
    path: str | Path,
    form: SnapshotForm,
    *,
    max_shard_size: str | int,
    files: Files,
    metadata: Mapping[str, str],
    overwrite: bool,
    published: Callable[[], None] | None = None,
    progress: Progress | None = None,
) -> None:
    """Write the live weights to the directory `path`. Collective in a pod.

    Args:
        engine: the engine of the model.
        path: the directory to write.
        form: the form of the files.
        max_shard_size, files, metadata, overwrite, published: as for `writing`.
        progress: as for `write_live`.

    Raises:
        OutputError: on every rank; `path` is unchanged.
    """
    with writing(
        path,
        form.stored.specs,
        engine.shard_group,
        max_shard_size=form.carried.shard_size(max_shard_size),
        files=files,
        overwrite=overwrite,
        base=form.carried.base,
        metadata=metadata,
        published=published,
    ) as writer:
        write_live(writer, engine, {name: (name,) for name in form.stored.tensors}, form.stored, progress)


def write_live(
    writer: Writer,
    engine: Engine,
    names: Mapping[str, Sequence[str]],
    form: StoredForm,
    progress: Progress | None = None,
) -> None:
    """Write the spans of this rank, and on the first rank the buffers.

    Args:
        writer: the writer of these tensors.
        engine: the engine of the model.
        names: the names in `form` of each parameter and buffer. Tensors without an entry are not written.
        form: the form in which the files hold the tensors.
        progress: called after each span with the bytes of the span and the total bytes of this rank.
    """
    spans, group = [span for span in engine.spans() if span.name in names], engine.shard_group
    first = len(spans) * group.rank // group.size  # Ranks start in different files to avoid waiting for each other.
    nbytes = {span: sum(form.nbytes(replace(span, name=name)) for name in names[span.name]) for span in spans}
    total = sum(nbytes.values())

    def write(model_name: str, span: Span, values: torch.Tensor) -> None:
        masks = may_be_mask(engine, model_name)
        for name in names.get(model_name, ()):
            for stored, part in form.spans(replace(span, name=name), values):
                writer.write(stored, part, allow_infinite=masks)

    for span in spans[first:] + spans[:first]:
        write(span.name, span, engine.live(span))
        if progress:
            progress(nbytes[span], total)
    if group.rank == 0:
        for model_name, buffer in engine.buffers().items():
            write(model_name, whole_tensor(model_name, tuple(buffer.shape)), buffer.reshape(-1))


def may_be_mask(engine: Engine, name: str) -> bool:
    """Return whether a tensor may hold infinite values, as attention masks do: not if it is trained or a statistic.

    Args:
        engine: the engine of the model.
        name: the name of a parameter or buffer in the model.
    """
    parameter = engine.parameters.get(name)
    return not is_statistic(name) if parameter is None else not parameter.trainable
