"""Find the state in an output directory, check that it belongs to this run, and detect finished runs."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from twa_scale.average.state import PREVIOUS, STATE, RunState, load_state, require_same_settings
from twa_scale.base.urls import absolute
from twa_scale.candidates.find import find_sources
from twa_scale.config import RunConfig
from twa_scale.errors import CandidateError, StateError

AVERAGE = "average"
SUMMARY = "summary.json"


def course(config: RunConfig, num_steps: int) -> dict[str, Any]:
    """Return the settings that determine the rest of a run, together with the state of the average."""
    settings = config.model_dump(mode="json", include={"split", "seed", "batch_size", "schedule", "precision"})
    return {"steps": num_steps, **settings}


def find_state(
    config: RunConfig, num_steps: int, log: Callable[[str], object], *, rows: Literal["all", "size"] = "all"
) -> RunState | None:
    """Return the state that the run continues from; None if there is none, or if `resume` is false.

    `rows` selects the check of the file of rows; see `load_state`.

    Raises:
        StateError: the state is damaged, or of a run with other settings. More steps are allowed.
    """
    output = Path(config.output)
    if not config.resume or not any((output / name).exists() for name in (STATE, PREVIOUS)):
        return None
    state = load_state(output, log, rows=rows)
    _require_same_course(output / STATE, state, course(config, num_steps))
    current = with_known_lr(config, state)
    require_same_settings(current.model_dump(mode="json"), state.twa.config.model_dump(mode="json"))
    return state


def with_known_lr(config: RunConfig, state: RunState | None) -> RunConfig:
    """Return `config` with a number for `optimizer.lr: auto`: that of the state, or the usual one of the optimizer."""
    if config.optimizer.lr != "auto":
        return config
    return config.with_lr(state.twa.config.lr if state else config.lr)


def finished_summary(config: RunConfig, num_steps: int, state: RunState) -> dict[str, Any] | None:
    """Return the summary of a finished run; None if results are missing, or if steps or candidates have changed."""
    if not state.finished or state.step != num_steps or not _same_candidates(config, state):
        return None
    output = Path(config.output)
    if not (output / AVERAGE).is_dir():
        return None
    summary = read_object(output / SUMMARY)
    return summary if summary is not None and summary.get("steps") == state.step else None


def read_object(path: Path) -> dict[str, Any] | None:
    """Return the JSON object in a file; None if it is missing or damaged."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None


def _require_same_course(path: Path, state: RunState, current: dict[str, Any]) -> None:
    for key, value in current.items():
        saved = state.course.get(key)
        if key == "steps":
            if not isinstance(saved, int) or value < saved:
                raise StateError(
                    f"{path}: steps was {saved!r} when it was saved, and is {value!r} now (of `steps` or `epochs`): "
                    "they can be raised, not lowered. Give at least as many, another output, or resume=false."
                )
        elif saved != value:
            raise StateError(
                f"{path}: {key} was {saved!r} when it was saved, and is {value!r} now; the course of the run would "
                "change. Give the same value, another output, or resume=false."
            )


def _same_candidates(config: RunConfig, state: RunState) -> bool:
    """Return whether the candidates are those of the state, or have all been removed."""
    try:
        sources = find_sources(config.candidates, 1, lambda _: None, config.select)
    except CandidateError:
        return not any(Path(path).exists() for path in state.candidates)
    return [absolute(str(source)) for source in sources] == state.candidates
