"""The schema of a saved state. Type, shape and finiteness of every field are checked before it is used."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from math import prod
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import torch
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from twa_scale.average.measures import elements_of_groups
from twa_scale.average.state.rows_file import DIRECTORY, RowsFile
from twa_scale.candidates.conversion import Conversion, made_of_state, row_major
from twa_scale.candidates.fingerprint import Fingerprint
from twa_scale.candidates.segments import Segment
from twa_scale.config import TwaConfig
from twa_scale.config.explain import first_problem
from twa_scale.errors import StateError

VERSION: Literal[2] = 2
"""The version of the format. States of other versions are refused."""


def _usable(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.layout is not torch.strided or tensor.is_meta or tensor.is_complex():
        raise ValueError(f"a tensor of layout {tensor.layout}, device {tensor.device} and type {tensor.dtype}")
    if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
        raise ValueError("holds values that are not finite")
    return tensor


Tensor = Annotated[torch.Tensor, AfterValidator(_usable)]
Names = list[str]
Count = Annotated[int, Field(ge=0)]


class _Saved(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, arbitrary_types_allowed=True)


class FingerprintState(_Saved):
    """The state of a `Fingerprint`."""

    labels: Annotated[Names, Field(min_length=1)]
    shapes: dict[str, tuple[Count, ...]]
    checksums: Tensor

    @model_validator(mode="after")
    def _fits(self) -> "FingerprintState":
        _require("checksums", self.checksums, (len(self.labels), len(self.shapes)), torch.int64)
        return self

    def build(self) -> Fingerprint:
        """Return the fingerprint."""
        return Fingerprint(tuple(self.labels), self.shapes, self.checksums)


class MadeState(_Saved):
    """The state of a `Made`; the rows of `segments` are those of `Conversion.state_dict`."""

    shape: tuple[Count, ...]
    stored: dict[str, tuple[Count, ...]]
    segments: Tensor

    @model_validator(mode="after")
    def _fits(self) -> "MadeState":
        rows = self.segments.shape[0] if self.segments.dim() else 0
        _require("segments", self.segments, (rows, 3 + 2 * len(self.shape)), torch.int64)
        if bool((self.segments < 0).any()) or bool((self.segments[:, 0] >= len(self.stored)).any()):
            raise ValueError("segments: numbers that are out of range")
        count = 0
        for segment in made_of_state("", self.shape, self.stored, self.segments).segments:
            count += segment.numel
            if not _is_inside(segment, self.shape) or segment.reversed().stop > prod(self.stored[segment.source.name]):
                raise ValueError(f"segments: one is not inside of the model's tensor and {segment.source.name!r}")
        if count != prod(self.shape):
            raise ValueError(f"segments: they have {count} elements, their tensor has {prod(self.shape)}")
        return self


def _is_inside(segment: Segment, shape: tuple[int, ...]) -> bool:
    """Return whether a box with the dimensions of `shape` is inside of it."""
    if segment.target.first >= prod(shape):
        return False
    starts = [segment.target.first // step % size for size, step in zip(shape, row_major(shape), strict=True)]
    return all(start + length <= size for start, length, size in zip(starts, segment.sizes, shape, strict=True))


class ConversionState(_Saved):
    """The state of a `Conversion`."""

    names: dict[str, str]
    made: dict[str, MadeState]

    def build(self) -> Conversion:
        """Return the conversion."""
        made = {
            name: made_of_state(name, state.shape, state.stored, state.segments) for name, state in self.made.items()
        }
        return Conversion(self.names, made)


class StoredRows(_Saved):
    """The file next to the state with the corrections of rows: see `rows_file`."""

    directory: Annotated[str, Field(pattern=f"^{DIRECTORY}$")]
    """The name of its directory in the directory of the state."""
    nbytes: Count
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    has_best: bool
    """Whether it also has the corrections of the best average."""
    values: Literal["last", "best"] = "last"
    """The kind of values in the file that belong to this state."""


class RowsState(_Saved):
    """The state of the corrections of rows, y: for each tensor (k, rows), float32. They are here or in a file."""

    stored: StoredRows | None = None
    """The file that has the values, and the moments of rows."""
    values: dict[str, Tensor]
    moments: dict[str, dict[str, Tensor] | Tensor | float | int | bool | None]
    """The state of their optimizer. Moments of rows are stored by tensor, like the values."""
    settings: dict[str, Any]
    """The settings of their optimizer."""
    maps: Tensor
    """For each group, the matrix from y to corrections of the averaging coefficients a: (G, n, k), float64."""
    names: dict[str, str]
    """The name in the model, by the name in the candidates."""

    @model_validator(mode="after")
    def _fits(self) -> "RowsState":
        k = self.maps.shape[-1] if self.maps.dim() == 3 else 0
        _require("maps", self.maps, (*self.maps.shape[:2], k), torch.float64)
        for name, value in self.values.items():
            _require(f"values.{name}", value, (k, value.shape[-1] if value.dim() else 0), torch.float32)
        if self.stored is None and (unknown := set(self.names.values()) - set(self.values)):
            raise ValueError(f"names: {min(unknown)!r} has no values")
        return self

    @contextmanager
    def reader(self, directory: Path) -> Iterator[Callable[[str], torch.Tensor]]:
        """Yield a function that returns the values of a tensor of the model by its name, (k, rows), float32.

        Their file is open until the end of the `with` block, so that it can be read even after a run has removed it.

        Args:
            directory: the directory of the state.

        Raises:
            StateError: the file cannot be read. The function also raises it if the file lacks the tensor.
        """
        if self.stored is None:
            yield self.values.__getitem__
            return
        with RowsFile(directory / self.stored.directory) as file, file.kept_open():
            yield partial(file.of_tensor, self.stored.values)


class AverageState(_Saved):
    """The state of a `TrainableAverage`: n candidates, G groups, k coefficients in each."""

    version: Literal[2]
    config: TwaConfig
    groups: Annotated[Names, Field(min_length=1)]
    group_of: dict[str, Count]
    experts: dict[str, Annotated[list[Count], Field(min_length=1)]] = {}
    """The groups of the experts that are stacked in a tensor, with `groups: expert`."""
    buffer_names: dict[str, str]
    """The name in the candidates, by the name in the model."""
    tied: list[Names] = []
    """The names in the candidates of each tensor of the model that has several."""
    x: Tensor
    """The coefficients, (k, G), float64."""
    coefficients: Tensor
    """The averaging coefficients a, (n, G), float64."""
    center_weights: Tensor
    """The weights b of the center, (n,), float64."""
    optimizer: dict[str, Any]
    rows: RowsState | None = None
    buffers: dict[str, Tensor]
    fingerprint: FingerprintState
    conversions: list[ConversionState] = []
    """The conversions from stored tensors to those of the model, for candidates that store other tensors."""

    @model_validator(mode="after")
    def _fits(self) -> "AverageState":
        n, num_groups = len(self.fingerprint.labels), len(self.groups)
        _require("coefficients", self.coefficients, (n, num_groups), torch.float64)
        _require("center_weights", self.center_weights, (n,), torch.float64)
        _require("x", self.x, (self.x.shape[0] if self.x.dim() else 0, num_groups), torch.float64)
        if self.rows is not None:
            _require("rows.maps", self.rows.maps, (num_groups, n, self.x.shape[0]), torch.float64)
        for name, group in self.group_of.items():
            if group >= num_groups:
                raise ValueError(f"group_of: {name!r} is in group {group}, and there are {num_groups}")
            if name not in self.fingerprint.shapes:
                raise ValueError(f"group_of: {name!r} is not among the tensors of the fingerprint")
        for name, groups in self.experts.items():
            shape = self.fingerprint.shapes.get(name, ())
            if name not in self.group_of or max(groups) >= num_groups or not shape or shape[0] % len(groups):
                raise ValueError(
                    f"experts: {name!r} has {len(groups)} experts, which do not fit its shape or the groups"
                )
        return self

    def groups_of(self, name: str) -> Sequence[int]:
        """Return the groups of the equal parts of a trained tensor: one, unless it stacks experts."""
        return self.experts.get(name) or (self.group_of[name],)

    @property
    def aliases(self) -> set[str]:
        """The names of tied tensors except the first name of each tensor."""
        return {name for names in self.tied for name in names[1:]}

    @property
    def elements(self) -> list[int]:
        """The number of elements of each group; tied tensors count once."""
        aliases = self.aliases
        groups_of = {name: self.groups_of(name) for name in self.group_of if name not in aliases}
        return elements_of_groups(len(self.groups), groups_of, self.fingerprint.shapes)

    def row_weights(self, name: str, values: Callable[[str], torch.Tensor]) -> torch.Tensor:
        """Return the averaging coefficients of each row of a tensor, (n, rows), float64.

        Args:
            name: the name in the candidates of a tensor whose rows have corrections.
            values: returns the corrections of a tensor of the model: see `RowsState.reader`.

        Raises:
            StateError: the file of the corrections cannot be read.
        """
        assert self.rows is not None
        group = self.group_of[name]
        return self.coefficients[:, group, None] + self.rows.maps[group] @ values(self.rows.names[name]).double()


class KeptState(_Saved):
    """The best average that a run has evaluated."""

    step: Count
    data: dict[str, Any]
    """The data of the evaluation and the name of the metric."""
    metrics: dict[str, Annotated[float, Field(allow_inf_nan=False)]]
    x: Tensor
    coefficients: Tensor
    row_values: dict[str, Tensor] = {}
    """The corrections of rows, y, unless they are in the file with those of the last step."""
    buffers: dict[str, Tensor]
    trial_lr: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """The rate of the trial that ended with this average, before step 0 (`optimizer.lr: auto`); None for a step."""

    @property
    def name(self) -> str:
        """The origin of the coefficients, such as "step 4"."""
        return f"step {self.step}" if self.trial_lr is None else f"the trial of optimizer.lr {self.trial_lr:g}"

    @model_validator(mode="after")
    def _fits(self) -> "KeptState":
        if self.data.get("metric") not in self.metrics:
            raise ValueError(f"data: its metric {self.data.get('metric')!r} is not among the metrics")
        return self


class RateState(_Saved):
    """The learning rate that a run has chosen (`optimizer.lr: auto`), and the rates that it tried."""

    lr: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    tried: list[float]
    metric: str
    """The split and the metric of `values`."""
    values: list[Annotated[float, Field(allow_inf_nan=False)] | None]
    """The metric after the steps with each rate; None if it was not finite."""
    steps: Count
    """The number of steps with each rate."""
    seconds: float
    """The time of the search in seconds."""


class RunState(_Saved):
    """The state that `twa-scale run` saves."""

    twa: AverageState
    """The average at the last step."""
    keep: Literal["best", "last"]
    """The coefficients that the run exports."""
    kept: KeptState | None
    rate: RateState | None = None
    """The learning rate that was chosen at the start."""
    step: Count
    finished: bool
    """Whether the results of this step have been written."""
    course: dict[str, Any]
    candidates: Annotated[Names, Field(min_length=1)]

    @model_validator(mode="after")
    def _fits(self) -> "RunState":
        if self.kept:
            _require("kept.x", self.kept.x, tuple(self.twa.x.shape), torch.float64)
            _require("kept.coefficients", self.kept.coefficients, tuple(self.twa.coefficients.shape), torch.float64)
            rows = self.twa.rows.values if self.twa.rows else {}
            for key, steps, expected in (
                ("buffers", self.kept.buffers, self.twa.buffers),
                ("row_values", self.kept.row_values, rows),
            ):
                if _shapes(steps) != _shapes(expected):
                    raise ValueError(f"kept.{key}: other names or shapes than those of the last step")
            if self.twa.rows and self.twa.rows.stored and not self.twa.rows.stored.has_best:
                raise ValueError("kept: the file of the corrections of rows does not have those of the best average")
        return self

    @property
    def kept_rows(self) -> RowsState | None:
        """The corrections of rows of the best average, with the moments of the last step."""
        rows = self.twa.rows
        if rows is None or self.kept is None:
            return None
        stored = rows.stored and rows.stored.model_copy(update={"values": "best"})
        return rows.model_copy(update={"values": self.kept.row_values, "stored": stored})

    @property
    def exported_step(self) -> int:
        """The step of the coefficients that the run exports."""
        return self.kept.step if self.kept and self.keep == "best" else self.step

    @property
    def exported_name(self) -> str:
        """The origin of the coefficients that the run exports, such as "step 4"."""
        return self.kept.name if self.kept and self.keep == "best" else f"step {self.step}"

    @property
    def exported(self) -> AverageState:
        """The state that the run exports, of the best or of the last step."""
        if self.kept is None or self.keep == "last":
            return self.twa
        kept = {name: getattr(self.kept, name) for name in ("x", "coefficients", "buffers")}
        return self.twa.model_copy(update={**kept, "rows": self.kept_rows})


def _shapes(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in tensors.items()}


def _require(name: str, tensor: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    if tuple(tensor.shape) != shape or tensor.dtype != dtype:
        raise ValueError(f"{name}: {tensor.dtype} of shape {tuple(tensor.shape)}, where {dtype} of {shape} belongs")


M = TypeVar("M", bound=_Saved)


def checked(model: type[M], state: Any, location: str) -> M:
    """Return `state` as a `model`.

    Raises:
        StateError: names the first field that is missing, unknown, or of another type, shape or version.
    """
    if not isinstance(state, Mapping):
        raise StateError(f"{location}: is {type(state).__name__}, not a saved state, which maps names to values.")
    version = state.get("version")
    if model is AverageState and (version is None or (type(version) is int and version != VERSION)):
        described = "no version" if version is None else f"version {version}"
        raise StateError(
            f"{location}: has {described} of the format, and this twa_scale reads version {VERSION}. Continue with the "
            "twa_scale that wrote it, or start a new run."
        )
    try:
        return model.model_validate(state)
    except ValidationError as error:
        problem, value = first_problem(error)
        raise StateError(
            f"{location}: {problem} (got {_shown(value)}). It is not the state of a run of this twa_scale. Give a "
            "saved state, or start a new run."
        ) from None


def _shown(value: object) -> str:
    text = type(value).__name__ if isinstance(value, torch.Tensor | Mapping) else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
