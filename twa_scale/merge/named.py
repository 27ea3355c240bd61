"""The merges of the commands `average` and `export`: fixed weights, and the trained coefficients of a run."""

import re
from collections.abc import Sequence
from functools import partial
from math import isfinite
from pathlib import Path

import torch

from twa_scale.average.state import load_state
from twa_scale.base.names import matches_any, nearest
from twa_scale.base.notices import notice
from twa_scale.candidates import Candidate, Wanted, asked_for, open_together
from twa_scale.candidates.adapters import Truncated, ranks_of
from twa_scale.candidates.buffers import Source, buffer_source, is_statistic, spectral_vectors
from twa_scale.candidates.carry_over import carried_files
from twa_scale.candidates.read_ahead import Progress
from twa_scale.config import (
    Center,
    SelectConfig,
    TwaConfig,
    center_weights,
    of_sum_one,
    parse_center,
    validated,
)
from twa_scale.errors import ConfigError
from twa_scale.merge.low_rank import truncated, truncation_line
from twa_scale.merge.streamed import merge
from twa_scale.merge.ties import require_equal_ties
from twa_scale.output.provenance import provenance, rows_provenance
from twa_scale.ranks import Group, require_same_settings

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


def average_fixed(
    candidates: Sequence[str],
    out: str | Path,
    weights: Center | None = None,
    *,
    normalize: bool = False,
    buffers: str | int = "average",
    ignore: Sequence[str] = (),
    weights_key: str | None = None,
    space: str = "auto",
    rank: int | None = None,
    select: SelectConfig | None = None,
    max_shard_size: str | int = "5GB",
    dtype: str | None = None,
    carry_code: bool = False,
    format: str = "hf",
    overwrite: bool = False,
    progress: Progress | None = None,
) -> list[tuple[str, float]]:
    """Average `candidates` (paths, globs, or PATH:WEIGHT) and write the result to `out`.

    Args:
        candidates: the candidates in training order; all of them as PATH:WEIGHT, or none.
        out: the directory to write.
        weights: a value of the setting `center`, or the same as text: a name, an index, or one weight for each
            candidate. The default is the mean, unless candidates are given as PATH:WEIGHT.
        normalize: whether weights that are given one by one are divided by their sum. Otherwise the sum must be 1.
        buffers: a value of the setting `buffers`. Buffers are recognized by name: see docs/candidates.md.
        ignore: regular expressions of tensors to leave out.
        weights_key: the key of the weights in files that hold several sets; see TwaConfig.
        space: a value of the setting `space`: what is averaged of LoRA adapters.
        select: which of the candidates are taken, and in which order; all, as they are found, when not given.
        rank: the rank to which the averages of products are truncated. Their relative error is reported.
        max_shard_size: see `merge`.
        dtype: the name of the floating point type to write.
        carry_code: whether code of the last candidate, such as *.py files, is copied with its other small files.
        format: the format of the output: "hf" (safetensors), "pt", "dcp" or "same"; see docs/candidates.md.
        overwrite: see `merge`.
        progress: see `merge`.

    Returns:
        The label and the weight of each candidate.

    Raises:
        ConfigError: the weights are unknown or do not sum to 1, or only some candidates have a weight.
        CandidateError, OutputError: see `merge`.
    """
    group = Group.world()
    with group.agree():
        paths, explicit = _split(candidates)
        wanted = asked_for(ignore, weights_key, space)
        chosen = parse_dtype(dtype)
    options = {"PATH:WEIGHT": explicit, "--weights": weights, "--normalize": normalize, "--buffers": buffers}
    options |= {"--space": space, "--rank": rank}
    select = select or SelectConfig()
    options |= {f"--{key.replace('_', '-')}": value for key, value in select.model_dump().items()}
    require_same_settings(group, options)
    if explicit is not None and select != SelectConfig():
        raise ConfigError(
            "PATH:WEIGHT: these candidates are chosen one by one; give the weights with --weights where --start-step, "
            "--end-step, --every, --last or --order choose them."
        )
    if explicit is not None and weights is not None:
        raise ConfigError(f"--weights {weights}: the candidates have weights as PATH:WEIGHT; give one or the other.")
    given = explicit if explicit is not None else _parsed("mean" if weights is None else weights)
    opened = open_together(paths, group, 1, wanted, select)
    vectors = spectral_vectors(opened[-1].names())
    if explicit is not None and len(explicit) != len(opened):
        raise ConfigError(
            f"{len(explicit)} weights for {len(opened)} candidates: each PATH:WEIGHT must match one candidate."
        )
    if isinstance(given, list):
        given = _of_sum_one(given, normalize)
    fixed = center_weights(given, len(opened), "--weights")
    option = _parsed_buffers(buffers, len(opened))

    low: Truncated | None = None
    with group.agree():
        if rank is not None:
            low = truncated(opened, fixed, rank)
            opened = [*opened[:-1], low]
        carried = carried_files(opened, files=group.rank == 0, code=carry_code)
    units = low.units if low else {}

    def source(name: str) -> Source:
        if name in units:
            return [0.0] * (len(opened) - 1) + [1.0]
        return buffer_source(name, option, fixed) if name in vectors or is_statistic(name) else fixed

    labels = [candidate.label for candidate in opened]
    merge(
        opened,
        out,
        source,
        group,
        carried=carried,
        origin=provenance(
            "an average with fixed weights", labels, weights=fixed, asked=given, dtype=dtype, **_products(opened, rank)
        ),
        max_shard_size=max_shard_size,
        dtype=chosen,
        form=format,
        overwrite=overwrite,
        progress=progress,
        verify=lambda checksums: require_equal_ties(opened, checksums),
        units=units,
    )
    if low and rank:
        line = truncation_line(low, rank, group)
        if group.rank == 0:
            notice(line)
    return list(zip(labels, fixed, strict=True))


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
        chosen = parse_dtype(dtype)
        if group.rank == 0:
            state = load_state(Path(run), notice)
    state = group.broadcast(state)  # read by one rank, because a shared file system may show ranks different files
    assert state is not None
    twa = state.exported
    known = {*twa.fingerprint.shapes, *twa.group_of}
    others = {*twa.buffer_names.values(), *twa.aliases}
    parameters = {name: tuple(shape) for name, shape in twa.fingerprint.shapes.items() if name not in others}
    wanted = Wanted(
        twa.config.weights_key,
        twa.config.ignore,
        known,
        parameters,
        twa.tied,
        conversions=[conversion.build() for conversion in twa.conversions],
        space=twa.config.space,
    )
    opened = open_together(state.candidates, group, wanted=wanted)
    fingerprint = twa.fingerprint.build()
    with group.agree():
        names = [name for name in opened[-1].names() if not matches_any(name, twa.config.ignore)]
        fingerprint.require_names(names, opened[-1].label)
    coefficients = twa.coefficients.T.tolist()
    center = [float(weight) for weight in twa.center_weights]
    buffers = {*twa.buffer_names.values(), *spectral_vectors(opened[-1].names())}

    def source(name: str) -> Source:
        if name in twa.group_of:
            return list(coefficients[twa.group_of[name]])
        return buffer_source(name, twa.config.buffers, center) if name in buffers else center

    part_weights = {name: [list(coefficients[group]) for group in groups] for name, groups in twa.experts.items()}
    row_weights = {name: partial(twa.row_weights, name) for name in twa.rows.names} if twa.rows else {}
    with group.agree():
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
    merge(
        opened,
        out,
        source,
        group,
        row_weights=row_weights,
        part_weights=part_weights,
        carried=carried,
        origin=origin,
        max_shard_size=max_shard_size,
        dtype=chosen,
        form=format,
        ignore=twa.config.ignore,
        replace={twa.buffer_names[n]: value for n, value in twa.buffers.items() if n in twa.buffer_names},
        overwrite=overwrite,
        progress=progress,
        verify=fingerprint.require_checksums,
    )
    last = "" if state.exported_step == state.step else f", the best of the evaluations (the last is step {state.step})"
    return len(opened), f"{state.exported_name}{last}"


def _products(candidates: Sequence[Candidate], rank: int | None) -> dict[str, object]:
    """Return the provenance of averaged products of adapters."""
    return {"space": "product", "rank": rank} if ranks_of(candidates[-1]) else {}


def parse_dtype(name: str | None) -> torch.dtype | None:
    """Return the floating point type called `name`, or None if `name` is None.

    Raises:
        ConfigError: the name is unknown.
    """
    if name is not None and name not in _DTYPES:
        raise ConfigError(f"dtype: {name!r} is not one of {', '.join(_DTYPES)}{nearest(name, _DTYPES) or '.'}")
    return _DTYPES[name] if name else None


def _parsed(weights: Center) -> Center:
    try:
        return parse_center(weights)
    except ValueError as error:
        raise ConfigError(f"--weights: {error}.") from None


def _parsed_buffers(buffers: str | int, n: int) -> str | int:
    """Return the setting `buffers` from an option, in which an index may be text."""
    if isinstance(buffers, str) and re.fullmatch(r"[-+]?\d+", buffers.strip()):
        buffers = int(buffers)
    option = validated(TwaConfig, {"buffers": buffers}, "--buffers").buffers
    buffer_source("", option, [1 / n] * n)  # raises if an index is out of range
    return option


def _of_sum_one(weights: list[float], normalize: bool) -> list[float]:
    try:
        return of_sum_one(weights, normalize=normalize)
    except ValueError as error:
        scalable = not normalize and all(map(isfinite, weights))
        fix = ", or be divided by their sum with --normalize (normalize=True)" if scalable else ""
        raise ConfigError(f"{error}{fix}: {', '.join(f'{weight:g}' for weight in weights[:8])}.") from None


def _split(candidates: Sequence[str]) -> tuple[list[str], list[float] | None]:
    """Split PATH:WEIGHT arguments into paths and weights. Either all arguments have a weight or none has."""
    pairs = [_pair(candidate) for candidate in candidates]
    paths = [path for path, _ in pairs]
    weights = [weight for _, weight in pairs if weight is not None]
    if weights and len(weights) < len(pairs):
        bare = next(path for path, weight in pairs if weight is None)
        raise ConfigError(f"{bare}: has no weight, but others have; write all candidates as PATH:WEIGHT, or none.")
    return paths, weights or None


def _pair(candidate: str) -> tuple[str, float | None]:
    path, _, text = candidate.rpartition(":")
    if not path or Path(candidate).exists():
        return candidate, None
    path = path if Path(path).exists() else path.strip()
    try:
        weight = float(text)
    except ValueError:
        if Path(path).exists():
            raise ConfigError(f"{candidate}: the weight {text!r} is not a number, as in {path}:0.5.") from None
        return candidate, None
    return path, weight
