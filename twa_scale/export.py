"""The live weights of a model as safetensors: every rank writes its own spans, none gathers."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from twa_scale.buffers import is_statistic
from twa_scale.engines import Engine
from twa_scale.layout import Layout
from twa_scale.notices import notice
from twa_scale.ranks import Pods
from twa_scale.reading import Progress
from twa_scale.sources import Candidate
from twa_scale.sources.carried import Carried
from twa_scale.sources.pairs import complex_in_files
from twa_scale.sources.types import types_notice, widest
from twa_scale.spans import whole
from twa_scale.writer import Writer, check_dtype, spec_of, writing
from twa_scale.writer.provenance import writing_options
from twa_scale.writer.publish import check_apart


def export(
    engine: Engine,
    pods: Pods,
    layout: Layout,
    candidates: Sequence[Candidate],
    carried: Carried,
    out: str | Path,
    *,
    dtype: torch.dtype | None = None,
    max_shard_size: str | int = "5GB",
    overwrite: bool = False,
    provenance: Mapping[str, Any],
    progress: Progress | None = None,
) -> None:
    """Write what the model holds now to the directory `out`, under the candidates' names and types. Collective.

    The result has the tensors of the last candidate that the model knows, tied ones under each of their names that
    it has, and its small files, so that what reads the candidates reads the average.

    Args:
        engine: the model.
        pods: all that hold it: the first writes.
        layout: which of its tensors the candidates hold.
        candidates: the last one gives names and types.
        carried: what else it gives; the small files are those of the first rank.
        out: a directory that is new, empty, or to be overwritten.
        dtype: type of all floating point tensors; when not given, the widest of the candidates, which is reported
            where they differ.
        max_shard_size: most bytes of one file; see `Carried.shard_size`.
        overwrite: replace an earlier output.
        provenance: written beside the weights as twa_scale.json, and into their headers.
        progress: called on every rank that writes.

    Raises:
        OutputError: on every rank; what stood at `out` is as it was.
    """
    with pods.agree():
        check_dtype(dtype)
    last = candidates[-1]
    names = [name for held in layout.held_as.values() for name in held]
    pairs = complex_in_files(last)
    specs = [
        spec_of(name, last.shape(name), widest(candidates, name), dtype, last.stored_names[name], pairs=name in pairs)
        for name in names
    ]
    options = writing_options(carried, provenance, dtype, max_shard_size)
    group = engine.shard_group
    with pods.agree():
        if pods.number != 0:
            return
        with group.agree():
            check_apart(out, [candidate.label for candidate in candidates])
        with writing(out, specs, group, overwrite=overwrite, **options) as writer:
            write_live(writer, engine, layout.held_as, progress)
    if pods.rank == 0 and dtype is None and (text := types_notice(candidates, names)):
        notice(text)


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
        names: under which names each parameter and buffer is written; a buffer that is not listed is left out.
        progress: called when a span is written.
    """
    spans, group = list(engine.spans()), engine.shard_group
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
