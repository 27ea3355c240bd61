"""The steps in the names of candidates, and the choice of candidates by step, number and order."""

import random
import re
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TypeVar

from twa_scale.base.names import quoted
from twa_scale.base.urls import Url
from twa_scale.candidates.directory import is_torch
from twa_scale.config import SelectConfig
from twa_scale.errors import CandidateError, ConfigError

T = TypeVar("T")

_SCALES = {"": 1, "k": 1_000, "m": 1_000_000}
_NUMBER = (
    r"(?P<number>\d+)(?P<scale>[kKmM]?)(?![A-Za-z0-9]|\.\d)"  # neither the "4B" of tokens nor the "0.25" of a loss
)
_STEP_PATTERNS = [
    re.compile(rf"(?<![A-Za-z])({words})[-_=. ]?{_NUMBER}", re.IGNORECASE)
    for words in ("global[-_]?steps?|steps?", "iter|iters|iterations?", "checkpoint|ckpt", "epochs?")
]
"""Words before the number of a step. In a name with several, such as `epoch=3-step=900`, the first kind is used."""
_NUMBER_PATTERN = re.compile(rf"(?<![A-Za-z0-9.]){_NUMBER}")
_COPY = re.compile(r"(.*[-_.])?(best|last|latest)([-_.]v?\d+)?(\.[a-z.]+)?", re.IGNORECASE)


def step_of(path: Path | Url, parents: int = 3) -> int | None:
    """Return the step in the name of a file or directory, or of the nearest directory above that names one.

    Names are `step-100`, `checkpoint-500`, `global_step40`, `epoch=3-step=900.ckpt`, `iter_0001000` and the like; or a
    single number without a word.

    Args:
        path: the file or directory.
        parents: the number of parent directories that may name the step, as in global_step_100/actor/model.
    """
    ancestors: Sequence[Path | Url] = path.parents
    names = [path.name, *(parent.name for parent in list(ancestors)[:parents])]
    for name in names:
        for pattern in _STEP_PATTERNS:
            if match := pattern.search(name):
                return _value(match)
    for name in names:
        if len(bare := list(_NUMBER_PATTERN.finditer(name))) == 1:
            return _value(bare[0])
    return None


def is_copy(path: Path | Url) -> bool:
    """Return whether a name is that of a copy of a step.

    Such names have directories (`checkpoint-best`) and files of torch: `last.ckpt` of Lightning, `model_best.pth.tar`
    of timm, `epoch_latest.pt` of open_clip, `checkpoint_best.pt` of fairseq.
    """
    return (
        (path.is_dir() or is_torch(path.name)) and _COPY.fullmatch(path.name) is not None and not has_step_number(path)
    )


def has_step_number(path: Path | Url) -> bool:
    """Return whether a name has the number of a step after a word such as `step` or `checkpoint`."""
    return any(pattern.search(path.name) for pattern in _STEP_PATTERNS)


def _value(match: re.Match[str]) -> int:
    return int(match["number"]) * _SCALES[match["scale"].lower()]


def chosen(sources: Sequence[T], select: SelectConfig, notify: Callable[[str], None]) -> list[T]:
    """Return the candidates that `select` takes, in its order, and report them.

    Raises:
        CandidateError: a name has no step, but the choice needs it.
        ConfigError: no candidate is left, or fewer than `last`.
    """
    if select == SelectConfig():
        return list(sources)
    taken = _in_range(sources, select) if select.by_step else list(sources)
    if select.last is not None:
        if select.last > len(taken):
            raise ConfigError(
                f"last: there are {len(taken)} candidates to take the last {select.last} of. Give a smaller number, or "
                "widen the pattern."
            )
        taken = taken[-select.last :]
    if select.order == "reverse":
        taken.reverse()
    elif select.order == "shuffle":
        random.Random(select.seed).shuffle(taken)
    notify(f"candidates: {len(taken)} of {len(sources)} are taken ({_described(select)}): {_listed(taken)}.")
    return taken


def _in_range(sources: Sequence[T], select: SelectConfig) -> list[T]:
    steps = []
    for source in sources:
        step = step_of(source) if isinstance(source, Path | Url) else None
        if step is None:
            which = repr(str(source)) if isinstance(source, Path | Url) else "a state dict"
            raise CandidateError(
                f"candidates: {which} has no step in its name, which start_step, end_step and every need. Names "
                "are such as 'step-100', 'checkpoint-500' or 'epoch=3-step=900.ckpt'. Narrow the pattern, or choose "
                "with `last`, or by a list of paths."
            )
        steps.append(step)
    _refuse_number_for_steps(steps, select)
    first, end, every = select.start_step or 0, select.end_step, select.every or 1
    taken = [
        source
        for source, step in zip(sources, steps, strict=True)
        if first <= step and (end is None or step <= end) and step % every == 0
    ]
    if not taken:
        raise ConfigError(
            f"candidates: none is left ({_described(select)}); their steps are "
            f"{quoted(map(str, sorted(set(steps))), 8)}."
        )
    return taken


def _refuse_number_for_steps(steps: Sequence[int], select: SelectConfig) -> None:
    """Raise an error for `every: 2` if steps are further apart, because every second candidate is meant."""
    different = sorted(set(steps))
    gaps = [second - first for first, second in pairwise(different)]
    if (
        select.every
        and select.every > 1
        and gaps
        and select.every < min(gaps)
        and not any(s % select.every for s in steps)
    ):
        raise ConfigError(
            f"every: {select.every} leaves nothing out, because it counts steps and the candidates are {min(gaps)} or "
            f"more steps apart. For each {select.every}. candidate give every: {select.every * min(gaps)}."
        )


def _described(select: SelectConfig) -> str:
    settings = select.model_dump(exclude_defaults=True)
    if select.order == "shuffle":
        settings["seed"] = select.seed
    return ", ".join(f"{key}: {value}" for key, value in settings.items())


def _listed(taken: Sequence[object]) -> str:
    paths = [source for source in taken if isinstance(source, Path | Url)]
    if len(paths) < len(taken):
        return f"{len(taken)} state dicts" if not paths else "paths and state dicts"
    labels = [str(path) for path in paths]
    return ", ".join(labels if len(labels) <= 4 else [*labels[:2], "..", labels[-1]])
