"""Write the live weights of a model as a checkpoint directory in the form of the candidates."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from twa_scale.average.layout import Layout
from twa_scale.base.notices import ignore_notice, notice
from twa_scale.candidates import Candidate
from twa_scale.candidates.carry_over import CarriedFiles
from twa_scale.candidates.dtypes import types_notice
from twa_scale.candidates.read_ahead import Progress
from twa_scale.engines import Engine
from twa_scale.errors import OutputError
from twa_scale.output import check_dtype, writing
from twa_scale.output.formats.choose import output_format
from twa_scale.output.live_weights import write_live
from twa_scale.output.options import OutputOptions
from twa_scale.output.provenance import writing_options
from twa_scale.output.publish import check_inputs_outside
from twa_scale.output.stored_form import StoredForm, form_of_candidates
from twa_scale.ranks import Pods


def export(
    engine: Engine,
    pods: Pods,
    layout: Layout,
    candidates: Sequence[Candidate],
    carried: CarriedFiles,
    out: str | Path,
    options: OutputOptions,
    provenance: Mapping[str, Any],
    progress: Progress | None = None,
) -> None:
    """Write the live weights to the directory `out`, with the tensor names and dtypes of the candidates. Collective.

    The output has every tensor of the last candidate that the model has, tied tensors under each of their names, and
    its small files, so that it can be loaded like a candidate.

    Args:
        engine: the model.
        pods: all ranks; the first pod writes.
        layout: maps tensors of the model to those of the candidates.
        candidates: the candidates, of which the last one defines names and dtypes.
        carried: the other files of the last candidate; used on the first rank.
        out: a directory that is new, empty, or to be overwritten.
        options: dtype, format and sizes of the files.
        provenance: written as twa_scale.json and into the headers of the weight files.
        progress: called on every rank that writes, with the bytes just written and the total.

    Raises:
        OutputError: on every rank; `out` is unchanged.
    """
    with pods.agree():
        check_dtype(options.dtype)
    names = [name for names_of_tensor in layout.names_in_candidates.values() for name in names_of_tensor]
    with pods.agree():
        chosen = output_format(options.form, candidates, carried, notice if pods.rank == 0 else ignore_notice)
    stored = form_of_candidates(candidates[-1:] if chosen.keeps_dtypes else candidates, names, options.dtype)
    arguments = writing_options(carried, provenance, options, chosen)
    group = engine.shard_group
    with pods.agree():
        if pods.number != 0:
            return
        with group.agree():
            check_inputs_outside(out, [candidate.label for candidate in candidates])
        with writing(out, stored.specs, group, **arguments) as writer:
            with group.agree():
                _require_one_tensor(writer.shared, layout, stored)
            write_live(writer, engine, layout.names_in_candidates, stored, progress)
    if (
        pods.rank == 0
        and options.dtype is None
        and (text := types_notice(candidates, names, of_last=chosen.keeps_dtypes))
    ):
        notice(text)


def _require_one_tensor(shared: Sequence[tuple[str, str]], layout: Layout, stored: StoredForm) -> None:
    """Check that tensors which share one place in the files are one tensor of the model.

    Raises:
        OutputError: two of them are different tensors. The message names them.
    """
    model_names = {
        raw: model_name
        for model_name, names in layout.names_in_candidates.items()
        for name in names
        for raw in stored.stored_names(name)
    }
    for first, second in shared:
        if model_names.get(first) != model_names.get(second):
            raise OutputError(
                f"tensors {first!r} and {second!r} are one tensor in the files of the last candidate, which "
                "format='same' keeps, but two in the model. Choose hf, dcp or pt."
            )
