"""Averages with fixed weights, the merge of the command `average`."""

import re
from collections.abc import Sequence
from itertools import compress
from math import isfinite
from pathlib import Path

from twa_scale.base.notices import notice
from twa_scale.candidates import Candidate, open_together, wanted_from_options
from twa_scale.candidates.adapters import Truncated, ranks_of
from twa_scale.candidates.buffers import Source, buffer_source, is_statistic, own_buffers
from twa_scale.candidates.carry_over import carried_files
from twa_scale.candidates.find import copies
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
from twa_scale.merge.combination import Combination
from twa_scale.merge.low_rank import truncated, truncation_line
from twa_scale.merge.streamed import Checksums, merge
from twa_scale.merge.ties import require_equal_ties
from twa_scale.output.options import OutputOptions, parse_dtype
from twa_scale.output.provenance import provenance
from twa_scale.ranks import Group, require_same_settings


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
        weights: a value of the setting `center`, also as text: a name, an index, or one weight for each candidate. The
            default is the mean, unless candidates are given as PATH:WEIGHT.
        normalize: whether weights that are given one by one are divided by their sum. Otherwise the sum must be 1.
        buffers: a value of the setting `buffers`. Buffers are recognized by name: see docs/candidates.md.
        ignore: regular expressions of tensors to leave out.
        weights_key: the key of the weights in files that hold several sets; see TwaConfig.
        space: a value of the setting `space`, for LoRA adapters.
        select: the range and the order of the candidates; by default, all as they are found.
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
        wanted = wanted_from_options(ignore, weights_key, space)
        output = OutputOptions(
            dtype=parse_dtype(dtype), max_shard_size=max_shard_size, form=format, overwrite=overwrite
        )
    select = select or SelectConfig()
    options = {"PATH:WEIGHT": explicit, "--weights": weights, "--normalize": normalize, "--buffers": buffers}
    options |= {"--space": space, "--rank": rank}
    options |= {f"--{key.replace('_', '-')}": value for key, value in select.model_dump().items()}
    require_same_settings(group, options)
    weights_given = _explicit_weights(explicit, weights, select)
    opened = open_together(paths, group, 1, wanted, select)
    if explicit is not None and len(explicit) != len(opened):
        raise ConfigError(
            f"{len(explicit)} weights for {len(opened)} candidates: each PATH:WEIGHT must match one candidate."
        )
    if isinstance(weights_given, list):
        weights_given = _of_sum_one(weights_given, normalize)
    fixed = center_weights(weights_given, len(opened), "--weights")
    of_buffers = _parsed_buffers(buffers, len(opened))
    low: Truncated | None = None
    with group.agree():
        low = None if rank is None else truncated(opened, fixed, rank)
        combination = _combination(opened, fixed, of_buffers, low)
        opened = [*opened[:-1], low] if low else opened
        carried = carried_files(opened, files=group.rank == 0, code=carry_code)
    labels = [candidate.label for candidate in opened]
    checksums = merge(
        opened,
        out,
        combination,
        group,
        output=output,
        carried=carried,
        origin=provenance(
            "an average with fixed weights",
            labels,
            weights=fixed,
            asked=weights_given,
            dtype=dtype,
            **_products(opened, rank),
        ),
        progress=progress,
        verify=lambda checksums: require_equal_ties(opened, checksums),
    )
    if group.rank == 0:
        _report_equals(labels, fixed, checksums)
    if low and rank:
        line = truncation_line(low, rank, group)
        if group.rank == 0:
            notice(line)
    return list(zip(labels, fixed, strict=True))


def _report_equals(labels: Sequence[str], weights: Sequence[float], checksums: Checksums) -> None:
    """Report candidates in which every tensor has the same checksum.

    Candidates of weight 0 are not compared, because not all of their tensors are read.
    """
    for equal in copies(list(compress(labels, weights)), list(compress(checksums, weights))):
        notice(
            f"candidates {equal} have the same checksum in every tensor: if they are copies, the same weights count "
            "several times."
        )


def _combination(
    candidates: Sequence[Candidate], weights: Sequence[float], buffers: str | int, low: Truncated | None
) -> Combination:
    """Return the weights of each tensor. Tensors that `low` computes replace those of the last candidate."""
    buffers_of_one, n = own_buffers(candidates[-1].names()), len(candidates)
    units = low.units if low else {}

    def source(name: str) -> Source:
        if name in units:
            return [0.0] * (n - 1) + [1.0]
        return buffer_source(name, buffers, weights) if name in buffers_of_one or is_statistic(name) else weights

    return Combination(source, units=units)


def _explicit_weights(explicit: list[float] | None, weights: Center | None, select: SelectConfig) -> Center:
    """Return the weights from the paths or from `weights`, or the default.

    Raises:
        ConfigError: weights were given twice, or with paths from which `select` chooses.
    """
    if explicit is None:
        return _parsed("mean" if weights is None else weights)
    if select != SelectConfig():
        raise ConfigError(
            "PATH:WEIGHT: give the weights with --weights if --start-step, --end-step, --every, --last or --order "
            "choose the candidates."
        )
    if weights is not None:
        raise ConfigError(f"--weights {weights}: the candidates have weights as PATH:WEIGHT; give one or the other.")
    return explicit


def _products(candidates: Sequence[Candidate], rank: int | None) -> dict[str, object]:
    """Return the provenance of averaged products of adapters."""
    return {"space": "product", "rank": rank} if ranks_of(candidates[-1]) else {}


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
    buffer_source("", option, [1 / n] * n)  # raises an error if an index is out of range
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
