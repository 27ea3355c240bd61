"""Writing the average that a model holds as a directory like those of its candidates."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from twa_scale.average.layout import Layout
from twa_scale.base.notices import notice
from twa_scale.candidates import Candidate
from twa_scale.candidates.carry_over import Carried
from twa_scale.candidates.dtypes import types_notice
from twa_scale.candidates.read_ahead import Progress
from twa_scale.engines import Engine
from twa_scale.output import check_dtype, writing
from twa_scale.output.live_weights import write_live
from twa_scale.output.provenance import writing_options
from twa_scale.output.publish import check_inputs_outside
from twa_scale.output.stored_form import form_of_candidates
from twa_scale.ranks import Pods


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
    names = [name for held in layout.held_as.values() for name in held]
    form = form_of_candidates(candidates, names, dtype)
    options = writing_options(carried, provenance, dtype, max_shard_size)
    group = engine.shard_group
    with pods.agree():
        if pods.number != 0:
            return
        with group.agree():
            check_inputs_outside(out, [candidate.label for candidate in candidates])
        with writing(out, form.specs, group, overwrite=overwrite, **options) as writer:
            write_live(writer, engine, layout.held_as, form, progress)
    if pods.rank == 0 and dtype is None and (text := types_notice(candidates, names)):
        notice(text)
