"""The live weights of a model, written by all ranks: each writes its own spans, and none gathers."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from twa_scale.base.spans import whole
from twa_scale.candidates.buffers import is_statistic
from twa_scale.candidates.read_ahead import Progress
from twa_scale.engines import Engine
from twa_scale.output.ranks_writer import Writer


def write_live(
    writer: Writer,
    engine: Engine,
    names: Mapping[str, Sequence[str]],
    progress: Progress | None = None,
) -> None:
    """Write this rank's spans of the live weights, and from the first rank the buffers.

    Args:
        writer: open for all these tensors.
        engine: the model.
        names: under which names each parameter and buffer is written; one that is not listed is left out.
        progress: called when a span is written.
    """
    spans, group = [span for span in engine.spans() if span.name in names], engine.shard_group
    first = len(spans) * group.rank // group.size  # ranks that are in different files do not wait for each other
    total = sum(writer.nbytes(span, names[span.name]) for span in spans)
    for span in spans[first:] + spans[:first]:
        values = engine.live(span)
        for name in names[span.name]:
            writer.write(replace(span, name=name), values, masks=may_be_mask(engine, span.name))
        if progress:
            progress(writer.nbytes(span, names[span.name]), total)
    if group.rank == 0:
        for own, buffer in engine.buffers().items():
            for name in names.get(own, ()):
                values = buffer.reshape(-1)
                writer.write(whole(name, tuple(buffer.shape)), values, masks=may_be_mask(engine, own))


def may_be_mask(engine: Engine, name: str) -> bool:
    """Whether a parameter or buffer may be infinite, as attention masks are: no statistic, and nothing that is trained.

    Args:
        engine: the model.
        name: the model's own name for it.
    """
    parameter = engine.parameters.get(name)
    return not is_statistic(name) if parameter is None else not parameter.trainable
