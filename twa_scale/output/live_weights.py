"""The live weights of a model, written by all ranks: each writes its own spans, and none gathers."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from twa_scale.base.spans import Span, whole
from twa_scale.candidates.buffers import is_statistic
from twa_scale.candidates.read_ahead import Progress
from twa_scale.engines import Engine
from twa_scale.output.ranks_writer import Writer
from twa_scale.output.stored_form import StoredForm


def write_live(
    writer: Writer,
    engine: Engine,
    names: Mapping[str, Sequence[str]],
    form: StoredForm,
    progress: Progress | None = None,
) -> None:
    """Write this rank's spans of the live weights, and from the first rank the buffers.

    Args:
        writer: open for all these tensors.
        engine: the model.
        names: under which names each parameter and buffer is written; one that is not listed is left out.
        form: what the files hold under these names.
        progress: called when a span is written.
    """
    spans, group = [span for span in engine.spans() if span.name in names], engine.shard_group
    first = len(spans) * group.rank // group.size  # ranks that are in different files do not wait for each other
    nbytes = {span: sum(form.nbytes(replace(span, name=name)) for name in names[span.name]) for span in spans}

    def write(own: str, span: Span, values: torch.Tensor) -> None:
        masks = may_be_mask(engine, own)
        for name in names.get(own, ()):
            for stored, part in form.spans(replace(span, name=name), values):
                writer.write(stored, part, masks=masks)

    for span in spans[first:] + spans[:first]:
        write(span.name, span, engine.live(span))
        if progress:
            progress(nbytes[span], sum(nbytes.values()))
    if group.rank == 0:
        for own, buffer in engine.buffers().items():
            write(own, whole(own, tuple(buffer.shape)), buffer.reshape(-1))


def may_be_mask(engine: Engine, name: str) -> bool:
    """Whether a parameter or buffer may be infinite, as attention masks are: no statistic, and nothing that is trained.

    Args:
        engine: the model.
        name: the model's own name for it.
    """
    parameter = engine.parameters.get(name)
    return not is_statistic(name) if parameter is None else not parameter.trainable
