"""Read the directory of a run, of an exported average, or of a trainer with `TwaCallback`."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from twa_scale.average.measures import COEFFICIENTS, DISTANCE, EFFECTIVE
from twa_scale.average.state import PREVIOUS, STATE, AverageState, RunState, load_state
from twa_scale.base.inputs import read_json_mapping
from twa_scale.base.notices import notice
from twa_scale.candidates.steps import step_of
from twa_scale.config.explain import first_problem
from twa_scale.errors import StateError
from twa_scale.output.lock import LOCK, owner_of
from twa_scale.output.provenance import PROVENANCE
from twa_scale.run.records import METRICS, read_records
from twa_scale.run.resume import AVERAGE, SUMMARY
from twa_scale.run.search import DIRECTORY as SEARCH
from twa_scale.tools.report.coefficients import Coefficients, Tensor

CONFIG, TRAINER_STATE = "config.json", "trainer_state.json"
_FIX = "Restore it, or remove it to leave its part of the page out."

Status = Literal["finished", "running", "stopped"]


class _Read(BaseModel):
    model_config = ConfigDict(extra="allow", frozen=True)


class Part(_Read):
    """The cost of a part of a step."""

    seconds: float = 0.0
    bytes: float = 0.0


class Summary(_Read):
    """summary.json of a finished run."""

    steps: int
    ranks: int = 1
    exported_step: int
    exported_from: str = ""
    exported_as: str = ""
    verdict: str | None = None
    advice: str | None = None
    comparison: dict[str, dict[str, float]] = Field(min_length=1)
    version: str | None = None
    effective_candidates: float | None = None
    distance: float | None = None
    candidate_distances: list[float] = []
    attach_seconds: float | None = None
    export_seconds: float | None = None
    forward_backward_seconds: float | None = None
    cost: dict[str, Part] = {}
    bytes_read_per_rank: list[float] = []
    store_bytes_per_rank: list[float] = []
    peak_resident_bytes_per_rank: list[float] = []


class Origin(_Read):
    """twa_scale.json of an exported average."""

    version: str = "unknown"
    wrote: str = "an average"
    candidates: list[str] = []
    groups: list[str] = ["all tensors"]
    elements: list[int] | None = None
    coefficients: list[list[float]] | None = None
    weights: list[float] | None = None
    step: int | None = None
    config: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _fits(self) -> "Origin":
        weights = self.by_candidate
        groups = len(self.groups) if self.coefficients is not None else 1
        if weights and (len(weights) != len(self.candidates) or any(len(row) != groups for row in weights)):
            raise ValueError("there is not one coefficient for each candidate and group")
        if self.elements is not None and len(self.elements) != len(self.groups):
            raise ValueError("elements: they do not have one number for each group")
        return self

    @property
    def by_candidate(self) -> list[list[float]]:
        """The coefficients of each candidate, by group; empty if they are unknown."""
        return self.coefficients if self.coefficients is not None else [[w] for w in self.weights or ()]


class Tried(_Read):
    """An average that a search has tried."""

    label: str
    score: float


class Search(_Read):
    """summary.json of `twa-scale search`."""

    metric: str
    num_candidates: int
    tried: list[Tried]
    """Best first."""


@dataclass(frozen=True)
class RunData:
    """The data of a run from its files. Missing data is None or empty."""

    directory: Path
    status: Status
    progress: str
    """The progress of the run, and the process that runs it."""
    step: int | None = None
    """The last step."""
    coefficients: Coefficients | None = None
    coefficients_of: str = ""
    """The step of the coefficients."""
    corrects_rows: bool = False
    records: Sequence[dict[str, Any]] = ()
    summary: Summary | None = None
    config: dict[str, Any] = field(default_factory=dict)
    origin: Origin | None = None
    paths: Sequence[str] = ()
    """The paths of the candidates."""
    search: Search | None = None
    """The search in the directory, or in the directory of a run."""
    is_run: bool = False
    """Whether it is the directory of `twa-scale run`."""


def read(directory: Path) -> RunData:
    """Return the data in the files of a directory.

    Raises:
        StateError: there are no files of twa_scale, or a file is damaged.
    """
    if not directory.is_dir():
        raise StateError(f"{directory}: there is no such directory; give the output directory of a run.")
    if any((directory / name).exists() for name in (STATE, PREVIOUS, METRICS, LOCK)):
        return _of_run(directory)
    if (directory / SEARCH / SUMMARY).exists():
        return read(directory / SEARCH)
    origin = _origin(directory) or _origin(directory / AVERAGE)
    logged = _trainer_records(directory)
    if origin is None and not logged:
        raise StateError(
            f"{directory}: holds nothing to report: neither {STATE} and {METRICS} of a run, nor {PROVENANCE} of an "
            f"average, nor {TRAINER_STATE} of a trainer. Give the output directory of a run, or of an average."
        )
    return RunData(
        directory,
        "finished",
        origin.wrote if origin else "a training",
        step=origin.step if origin else max(record["step"] for record in logged),
        coefficients=_coefficients_of_origin(origin) if origin else None,
        coefficients_of="" if origin is None or origin.step is None else f"step {origin.step}",
        records=logged,
        config=(origin and origin.config) or {},
        origin=origin,
        paths=origin.candidates if origin else (),
        search=_search(directory),
    )


def _of_run(directory: Path) -> RunData:
    exists = any((directory / name).exists() for name in (STATE, PREVIOUS))
    state = load_state(directory, notice, rows="none") if exists else None
    records = read_records(directory)
    summary = _parsed(Summary, directory / SUMMARY) if state and state.finished else None
    config = _json(directory / CONFIG) or {}
    step = max([state.step if state else 0, *(record["step"] for record in records)])
    owner = owner_of(directory)
    total = (state and state.course.get("steps")) or config.get("steps")
    so_far = f"step {step} of {total}" if total else f"step {step}"
    status: Status = "finished" if state and state.finished else "stopped"
    progress = so_far if state and state.finished else f"{so_far}; the same command continues it"
    if owner is not None:
        status, progress = "running", f"{so_far}, {owner}"
    return RunData(
        directory,
        status,
        progress,
        step=step,
        coefficients=_coefficients_of_state(state.exported) if state else None,
        coefficients_of=_which(state) if state else "",
        corrects_rows=bool(state and state.twa.rows),
        records=records,
        summary=summary,
        config=config,
        origin=_origin(directory / AVERAGE) if summary else None,
        paths=state.candidates if state else (),
        search=_search(directory / SEARCH),
        is_run=True,
    )


def _search(directory: Path) -> Search | None:
    path = directory / SUMMARY
    content = _json(path)
    return _parsed(Search, path) if content and "tried" in content else None


def _which(state: RunState) -> str:
    best = "the best of the evaluations" if state.exported_step != state.step or state.keep == "best" else "the last"
    return f"{state.exported_name}, {best}{'' if state.finished else ' so far'}"


def _coefficients_of_state(state: AverageState) -> Coefficients:
    shapes, aliases = state.fingerprint.shapes, state.aliases
    tensors = []
    for name in (name for name in state.group_of if name not in aliases):
        groups = state.groups_of(name)
        size = int(torch.Size(shapes[name]).numel()) // len(groups)
        for i, group in enumerate(groups):
            path, _, last = name.rpartition(".")
            tensors.append(Tensor(f"{path}.{i}.{last}" if name in state.experts else name, group, size))
    return Coefficients(state.fingerprint.labels, state.groups, state.coefficients, tensors)


def _coefficients_of_origin(origin: Origin) -> Coefficients | None:
    weights = origin.by_candidate
    if not weights:
        return None
    groups = origin.groups if origin.coefficients is not None else ["all tensors"]
    counts = origin.elements or [1] * len(groups)
    tensors = [Tensor(name, i, count) for i, (name, count) in enumerate(zip(groups, counts, strict=True))]
    return Coefficients(origin.candidates, groups, torch.tensor(weights, dtype=torch.float64), tensors)


def _trainer_records(directory: Path) -> list[dict[str, Any]]:
    """Return the records that a Trainer has logged in its output directory or its last checkpoint."""
    checkpoints = [path.parent for path in directory.glob(f"checkpoint-*/{TRAINER_STATE}")]
    last = max(checkpoints, key=lambda path: step_of(path, 0) or 0, default=None)
    for folder in (directory, last):
        content = _json(folder / TRAINER_STATE) if folder else None
        history = content.get("log_history") if content else None
        if isinstance(history, list):
            return [record for entry in history if (record := _numbers(entry))]
    return []


def _numbers(entry: Any) -> dict[str, Any] | None:
    """Return the numbers of one line of a Trainer's log, with the names that records of a run have."""
    if not isinstance(entry, dict) or type(entry.get("step")) is not int:
        return None
    numbers = {key: value for key, value in entry.items() if type(value) in (int, float) and key != "epoch"}
    # The Trainer logs all steps of learning with the last step of training.
    if type(learning_step := numbers.get("twa_step")) is int:
        numbers["step"] = learning_step
    return {_name(key): value for key, value in numbers.items()}


def _name(key: str) -> str:
    """Return the name that a run has for a number in a Trainer's log."""
    if key.startswith("eval_"):
        return f"eval/{key.removeprefix('eval_')}"
    of_average = key.removeprefix("twa_")
    if of_average in (EFFECTIVE, DISTANCE) or of_average.startswith(COEFFICIENTS):
        return of_average
    return "lr" if key == "learning_rate" else key


def _origin(directory: Path) -> Origin | None:
    return _parsed(Origin, directory / PROVENANCE)


M = TypeVar("M", bound=_Read)


def _parsed(model: type[M], path: Path) -> M | None:
    """Return the content of a JSON file as a `model`, or None if there is no such file."""
    content = _json(path)
    if content is None:
        return None
    try:
        return model.model_validate(content)
    except ValidationError as error:
        raise StateError(f"{path}: {first_problem(error)[0]}. {_FIX}") from None


def _json(path: Path) -> dict[str, Any] | None:
    """Return the content of a JSON file, or None if there is no such file."""
    return read_json_mapping(path, StateError, _FIX) if path.exists() else None


def dumped(value: Any) -> str:
    """Return a setting as it is written in a configuration."""
    return value if isinstance(value, str) else json.dumps(value)
