"""Choose the tensors of opened files that are weights, with tied tensors under each of their names."""

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import cast, get_args

from twa_scale.base.names import and_more, matches_any, nearest, refuse_unused, some
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
    """Which tensors of the files are wanted."""

    weights_key: str | None = None
    """Where the weights are in files that hold more, with dots between keys; where they usually are when not given."""
    ignore: Sequence[str] = ()
    """Regular expressions of names to leave out."""
    known: Collection[str] = ()
    """Names of the model's tensors: these are weights, whatever their names look like."""
    parameters: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Names and shapes of the model's parameters, in its order."""
    ties: Ties | None = None
    """What the model ties; found from the values where there is no model."""
    naming: Naming | None = None
    """How names become those of the model; where there is none, they stay as they are stored."""
    conversions: Sequence[Conversion] = ()
    """What was made of them when there was a model."""
    must_match: bool = False
    """Whether each pattern of `ignore` has to be found in the name of a tensor."""
    space: Space = "auto"
    """In which space adapters are averaged."""


ALL = Wanted()


def asked_for(ignore: Sequence[str], weights_key: str | None, space: str = "auto") -> Wanted:
    """Return what `--ignore`, `--weights-key` and `--space` ask for.

    Raises:
        ConfigError: a pattern that is no regular expression, or a space of another name.
    """
    if space not in get_args(Space):
        raise ConfigError(
            f"--space: {space!r} is none of {', '.join(get_args(Space))}{nearest(space, get_args(Space))}"
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
    """Return the candidates with the tensors that are wanted, and a line about each thing that a user may not expect.

    Args:
        candidates: the candidates with all tensors of their files.
        wanted: which of them to keep.
        ignored_lists: the names of lists of tensors, and of other objects, that `ignore` has left out already.

    Raises:
        CandidateError: quantized weights, or no weights at all.
        ConfigError: a pattern that matches nothing although it must.
    """
    if wanted.must_match:
        everything = sorted({name for candidate in candidates for name in candidate.names()} | set(ignored_lists))
        refuse_unused("ignore", wanted.ignore, everything)
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
            why = "is ignored" if not entries else f"belongs to an optimizer ({some(entries)})"
            raise CandidateError(f"{candidate.label}: holds no weights: every tensor {why}. Leave this candidate out.")
        refuse_quantized(candidate, wanted.ignore, wanted.known)
        selected.append(candidate if len(kept) == len(names) else View(candidate, dict(zip(kept, kept, strict=True))))
    lines = []
    if left_out:
        found = next(iter(left_out.values()))
        lines.append(f"{and_more(list(left_out))}: entries of an optimizer are not read: {some(found)}.")
    selected = [as_recorded(candidate, wanted.conversions) for candidate in selected]
    if wanted.naming:
        selected, inferred = in_live_names(selected, wanted.naming)
        lines += inferred + _about_ignored(selected[0], wanted)
    selected, missing = complete(selected, wanted.ties)
    return selected, lines + missing + _about_factors(selected)


def _about_ignored(candidate: Candidate, wanted: Wanted) -> list[str]:
    """Return a line where patterns match names of the model, but none that these tensors have in files."""
    names = [name for name in candidate.names() if name in wanted.known and matches_any(name, wanted.ignore)]
    if not names:
        return []
    return [
        f"{candidate.label}: `ignore` also matches {some(names)} of the model, which files hold under other names: "
        "they are not read either. Anchor the pattern (^, $) if only names in files are meant."
    ]


def _about_factors(candidates: Sequence[Candidate]) -> list[str]:
    """Return a line where several candidates that are no LoRA adapters of PEFT hold factors of low-rank updates."""
    factors = [name for name in candidates[0].names() if _FACTOR.search(name)]
    config = adapter_config(candidates[-1])
    if not factors or len(candidates) < 2 or (config and config.kind == "LORA"):
        return []
    return [
        f"{candidates[0].label}: {some(factors, 2)} are factors of low-rank updates (LoRA). They are averaged one by "
        "one, which is not the average of their products; for that, give LoRA adapters of PEFT as directories and set "
        "`space: product`, or merge each adapter into its weights first."
    ]
