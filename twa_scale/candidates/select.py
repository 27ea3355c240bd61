"""Choose the tensors of opened files that are weights, with tied tensors under each of their names."""

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import cast, get_args

from twa_scale.base.names import and_more, matches_any, nearest, quoted, refuse_unused
from twa_scale.candidates.adapters import Space, adapter_config
from twa_scale.candidates.candidate import Candidate
from twa_scale.candidates.conversion import Conversion
from twa_scale.candidates.entries import optimizer_entries
from twa_scale.candidates.live_names import Naming, as_recorded, in_live_names
from twa_scale.candidates.quantized import refuse_quantized
from twa_scale.candidates.ties import Ties, complete
from twa_scale.candidates.view import View
from twa_scale.errors import CandidateError, ConfigError

_FACTOR = re.compile(
    r"(^|[._])(lora_(A|B|down|up|embedding_[AB])|lora\.(down|up)|hada_w[12]_[ab]|lokr_w[12](_[ab])?)([._]|$)"
)


@dataclass(frozen=True)
class Wanted:
    """The selection of tensors in the files."""

    weights_key: str | None = None
    """The key of the weights in files with further content, with dots between keys; by default, the usual keys."""
    ignore: Sequence[str] = ()
    """Regular expressions of names that are left out."""
    known: Collection[str] = ()
    """The names of the model's tensors, which are weights independent of their names."""
    parameters: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """The names and shapes of the model's parameters, in its order."""
    ties: Ties | None = None
    """The tied names of the model; by default, found from the values."""
    naming: Naming | None = None
    """The mapping of names to those of the model; None keeps the stored names."""
    conversions: Sequence[Conversion] = ()
    """The recorded conversions of the candidates, from a run with a model."""
    must_match: bool = False
    """Whether each pattern of `ignore` must match the name of a tensor."""
    space: Space = "auto"
    """The space in which adapters are averaged."""


ALL = Wanted()


def wanted_from_options(ignore: Sequence[str], weights_key: str | None, space: str = "auto") -> Wanted:
    """Return the selection for `--ignore`, `--weights-key` and `--space`.

    Raises:
        ConfigError: a pattern is not a regular expression, or the space is unknown.
    """
    if space not in get_args(Space):
        raise ConfigError(
            f"--space: {space!r} is not one of {', '.join(get_args(Space))}{nearest(space, get_args(Space))}"
        )
    for pattern in ignore:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ConfigError(f"--ignore: {pattern!r} is not a regular expression: {error}.") from None
    return Wanted(weights_key, ignore, must_match=True, space=cast("Space", space))


def select(
    candidates: Sequence[Candidate], wanted: Wanted, ignored_lists: Iterable[str] = ()
) -> tuple[list[Candidate], list[str]]:
    """Return the candidates with the selected tensors, and notices for the user.

    Args:
        candidates: the candidates with all tensors of their files.
        wanted: the selection.
        ignored_lists: the names of lists of tensors and other objects that `ignore` has already left out.

    Raises:
        CandidateError: the weights are quantized, or there are none.
        ConfigError: a pattern that must match a name matches none.
    """
    if wanted.must_match:
        all_names = sorted({name for candidate in candidates for name in candidate.names()} | set(ignored_lists))
        refuse_unused("ignore", wanted.ignore, all_names)
    selected: list[Candidate] = []
    left_out: dict[str, list[str]] = {}
    for candidate in candidates:
        names = candidate.names()
        ignored = {name for name in names if matches_any(name, wanted.ignore)}
        entries = optimizer_entries(names) - ignored - set(wanted.known)
        if entries:
            left_out[candidate.label] = sorted(entries)
        kept = [name for name in names if name not in ignored and name not in entries]
        if not kept:
            reason = "is ignored" if not entries else f"belongs to an optimizer ({quoted(entries)})"
            raise CandidateError(
                f"{candidate.label}: holds no weights: every tensor {reason}. Leave this candidate out."
            )
        refuse_quantized(candidate, wanted.ignore, wanted.known)
        _refuse_without_numbers(candidate, kept, wanted)
        selected.append(candidate if len(kept) == len(names) else View(candidate, dict(zip(kept, kept, strict=True))))
    lines = []
    if wanted.must_match and (dropped := [n for n in candidates[-1].names() if matches_any(n, wanted.ignore)]):
        lines.append(
            f"{candidates[-1].label}: `--ignore` leaves out {quoted(dropped)}. An average of these candidates lacks "
            "what is left out, and from_pretrained initializes it again."
        )
    if left_out:
        first_ignored = next(iter(left_out.values()))
        lines.append(f"{and_more(list(left_out))}: entries of an optimizer are not read: {quoted(first_ignored)}.")
    selected = [as_recorded(candidate, wanted.conversions) for candidate in selected]
    if wanted.naming:
        selected, inferred = in_live_names(selected, wanted.naming)
        lines += inferred + _about_ignored(selected[0], wanted)
    selected, missing = complete(selected, wanted.ties)
    return selected, lines + missing + _about_factors(selected)


def _refuse_without_numbers(candidate: Candidate, names: Sequence[str], wanted: Wanted) -> None:
    """Refuse a candidate with empty weights, or without a floating point number.

    Raises:
        CandidateError: naming the tensors.
    """
    empty = [name for name in names if candidate.shape(name) == (0,)]
    weights = [name for name in empty if name.rpartition(".")[2] == "weight" and wanted.parameters.get(name) != (0,)]
    if weights or len(empty) == len(names):
        raise CandidateError(
            f"{candidate.label}: no elements are in {quoted(weights or empty)}. With DeepSpeed ZeRO-3, "
            "model.state_dict() holds such placeholders: give the checkpoint that DeepSpeed writes, or save with "
            "engine.save_16bit_model. Name tensors that are meant to be empty in `ignore` (--ignore)."
        )
    if not any(candidate.dtype(name).is_floating_point or candidate.dtype(name).is_complex for name in names):
        raise CandidateError(
            f"{candidate.label}: holds no floating point numbers to average: {quoted(names)} are integers, such as the "
            "state of a random generator. Give a file of weights."
        )


def _about_ignored(candidate: Candidate, wanted: Wanted) -> list[str]:
    """Return a notice if patterns match names of the model, but not the names of these tensors in files."""
    names = [name for name in candidate.names() if name in wanted.known and matches_any(name, wanted.ignore)]
    if not names:
        return []
    return [
        f"{candidate.label}: `ignore` also matches {quoted(names)} of the model, which files hold under other names: "
        "they are not read either. Anchor the pattern (^, $) if only names in files are meant."
    ]


def _about_factors(candidates: Sequence[Candidate]) -> list[str]:
    """Return a notice if several candidates that are not LoRA adapters of PEFT have factors of low-rank updates."""
    factors = [name for name in candidates[0].names() if _FACTOR.search(name)]
    config = adapter_config(candidates[-1])
    if not factors or len(candidates) < 2 or (config and config.kind == "LORA"):
        return []
    return [
        f"{candidates[0].label}: {quoted(factors, 2)} are factors of low-rank updates (LoRA). They are averaged "
        "separately, which is not the average of their products; for that, give LoRA adapters of PEFT as directories "
        "and set `space: product`, or merge each adapter into its weights first."
    ]
