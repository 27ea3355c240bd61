"""The average of a run, computed from its state and the candidates: the merge of the command `export`."""

from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from twa_scale.average.state import AverageState, load_state
from twa_scale.base.names import matches_any
from twa_scale.base.notices import notice
from twa_scale.candidates import Candidate, Wanted, open_together
from twa_scale.candidates.buffers import Source, buffer_source, own_buffers
from twa_scale.candidates.carry_over import carried_files
from twa_scale.candidates.read_ahead import Progress
from twa_scale.merge.combination import Combination, RowWeights
from twa_scale.merge.streamed import merge
from twa_scale.output.options import OutputOptions, parse_dtype
from twa_scale.output.provenance import provenance, rows_provenance
from twa_scale.ranks import Group


def export_run(
    run: str | Path,
    out: str | Path,
    *,
    max_shard_size: str | int = "5GB",
    dtype: str | None = None,
    carry_code: bool = False,
    format: str = "hf",
    overwrite: bool = False,
    progress: Progress | None = None,
) -> tuple[int, str]:
    """Write sum_i a_i w_i with the coefficients that `run` exports, from its state and the candidates alone.

    Args:
        run: the output directory of the run.
        out: the directory to write.
        max_shard_size: see `merge`.
        dtype: the name of the floating point type to write.
        carry_code: whether code of the last candidate, such as *.py files, is copied with its other small files.
        format: the format of the output: "hf" (safetensors), "pt", "dcp" or "same"; see docs/candidates.md.
        overwrite: see `merge`.
        progress: see `merge`.

    Returns:
        The number of candidates, and a description of the step of the coefficients.

    Raises:
        StateError: the run has no state, or the candidates have changed since the run. Nothing is written.
        CandidateError, OutputError: see `merge`.
    """
    group, state = Group.world(), None
    with group.agree():
        output = OutputOptions(
            dtype=parse_dtype(dtype), max_shard_size=max_shard_size, form=format, overwrite=overwrite
        )
        if group.rank == 0:
            state = load_state(Path(run), notice)
    state = group.broadcast(state)  # read by one rank, because a shared file system may show ranks different files
    assert state is not None
    twa = state.exported
    opened = open_together(state.candidates, group, wanted=_wanted(twa))
    fingerprint = twa.fingerprint.build()
    with group.agree():
        names = [name for name in opened[-1].names() if not matches_any(name, twa.config.ignore)]
        fingerprint.require_names(names, opened[-1].label)
        carried = carried_files(opened, files=group.rank == 0, code=carry_code or twa.config.carry_code)
    origin = provenance(
        "the exact merge of a run",
        [candidate.label for candidate in opened],
        step=state.exported_step,
        config=twa.config.model_dump(mode="json"),
        groups=list(twa.groups),
        elements=twa.elements,
        coefficients=twa.coefficients.tolist(),
        dtype=dtype,
        **rows_provenance(twa.rows is not None),
    )
    with ExitStack() as stack:
        row_weights: RowWeights = {}
        with group.agree():
            if twa.rows:
                values = stack.enter_context(twa.rows.reader(Path(run)))
                row_weights = {name: partial(twa.row_weights, name, values) for name in twa.rows.names}
        merge(
            opened,
            out,
            _combination(twa, opened, row_weights),
            group,
            output=output,
            carried=carried,
            origin=origin,
            ignore=twa.config.ignore,
            progress=progress,
            verify=fingerprint.require_checksums,
        )
    last = "" if state.exported_step == state.step else f", the best of the evaluations (the last is step {state.step})"
    return len(opened), f"{state.exported_name}{last}"


def _wanted(twa: AverageState) -> Wanted:
    """Return the selection of tensors of the candidates, from the state of their average."""
    others = {*twa.buffer_names.values(), *twa.aliases}
    return Wanted(
        twa.config.weights_key,
        twa.config.ignore,
        {*twa.fingerprint.shapes, *twa.group_of},
        {name: tuple(shape) for name, shape in twa.fingerprint.shapes.items() if name not in others},
        twa.tied,
        conversions=[conversion.build() for conversion in twa.conversions],
        space=twa.config.space,
    )


def _combination(twa: AverageState, candidates: Sequence[Candidate], row_weights: RowWeights) -> Combination:
    """Return the weights of each tensor: the trained coefficients, or the weights of the center for other tensors."""
    coefficients = twa.coefficients.T.tolist()
    center = [float(weight) for weight in twa.center_weights]
    buffers = {*twa.buffer_names.values(), *own_buffers(candidates[-1].names())}

    def source(name: str) -> Source:
        if name in twa.group_of:
            return list(coefficients[twa.group_of[name]])
        return buffer_source(name, twa.config.buffers, center) if name in buffers else center

    return Combination(
        source,
        row_weights=row_weights,
        part_weights={name: [list(coefficients[group]) for group in groups] for name, groups in twa.experts.items()},
        values={twa.buffer_names[n]: value for n, value in twa.buffers.items() if n in twa.buffer_names},
    )
