"""What a user can set: one schema for Python, YAML files and the command line. Imports no torch."""

import json
import re
from difflib import get_close_matches
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, ValidationError, field_validator
from pydantic import model_validator as _model_validator

from twa_scale.errors import ConfigError

Weight = float
Center = str | int | list[Weight]
M = TypeVar("M", bound="Section")


class Section(BaseModel):
    """A frozen group of settings that refuses keys it does not know."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class OptimizerConfig(BaseModel):
    """The optimizer of the coefficients: any class of torch.optim; every further key goes to its constructor."""

    model_config = ConfigDict(extra="allow", frozen=True)

    name: str = Field(
        "adamw", description="Class of torch.optim, in any case: `adamw`, `sgd`, `lbfgs` is not supported."
    )
    lr: PositiveFloat = Field(0.03, description="Learning rate, in the units that `units` names.")

    @property
    def options(self) -> dict[str, Any]:
        """Constructor arguments beside lr. AdamW's own default decay would pull the average to the center: 0 here."""
        extra = dict(self.model_extra or {})
        if self.name.lower() == "adamw":
            extra.setdefault("weight_decay", 0.0)
        return extra


class TwaConfig(Section):
    """How the average is parametrized and trained; the `config` of `twa_scale.attach`."""

    basis: Literal["normalized", "orthonormal", "pca", "simplex"] = Field(
        "normalized",
        description="What the coefficients multiply: `normalized` deltas (TWA v4), an `orthonormal` basis of the "
        "candidates "
        "(TWA, ICLR 2023), leading `pca` directions (DLDR), or softmax weights on the `simplex` (learned soup).",
    )
    groups: Literal["global", "block", "tensor"] | list[str] = Field(
        "global",
        description="Tensors that share one coefficient per candidate: all of them, one group per `block` or "
        "`tensor`, or "
        "one group per regular expression of a list (the first that is found in the name wins; the others share a "
        "group).",
    )
    center: Center = Field(
        "mean",
        description="Fixed-weight average that training starts around: `mean`, `ema:0.9` (decay per candidate), "
        "`linear`, "
        "`minus-sqrt` (WSM's decay shapes), `first`, `last`, the index of a candidate, or one weight per candidate.",
    )
    units: Literal["delta", "weight"] = Field(
        "delta",
        description="`delta` scales the basis of a group by its mean delta norm, so that one learning rate means "
        "the same on "
        "every model; `weight` leaves unit-norm basis vectors, as published.",
    )
    start: Literal["center", "first", "last"] | int = Field(
        "center",
        description="Where the coefficients start: at the `center`, or at a candidate (`first`, `last`, an index).",
    )
    store: Literal["dense32", "dense16"] = Field(
        "dense32", description="How the deltas are held beside the weights: float32 or bfloat16."
    )
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig, description="Optimizer of the coefficients.")
    max_grad_norm: PositiveFloat | None = Field(None, description="Clip the coefficient gradient to this norm.")
    num_components: PositiveInt | None = Field(
        None, description="Number of directions that `pca` keeps; all that are not numerically zero when not given."
    )
    include: list[str] = Field([], description="Regular expressions of tensor names to train; all when empty.")
    exclude: list[str] = Field([], description="Regular expressions of tensor names to leave at the center.")
    ignore: list[str] = Field([], description="Regular expressions of candidate tensors that the model does not have.")
    buffers: Literal["mean", "first", "last"] | int = Field(
        "mean",
        description="Floating point buffers: the candidates' `mean`, or those of one candidate. Integers: the last's.",
    )

    @field_validator("groups", "include", "exclude", "ignore")
    @classmethod
    def _regular_expressions(cls, value: str | list[str]) -> str | list[str]:
        for pattern in value if isinstance(value, list) else []:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"{pattern!r} is not a regular expression: {error}") from None
        return value

    @field_validator("center")
    @classmethod
    def _known_center(cls, center: Center) -> Center:
        if isinstance(center, str) and center not in ("mean", "linear", "minus-sqrt", "first", "last"):
            _ema_decay(center)
        return center

    @_model_validator(mode="after")
    def _components_need_pca(self) -> "TwaConfig":
        if self.num_components is not None and self.basis != "pca":
            raise ValueError(f"num_components is for basis 'pca'; the basis is {self.basis!r}")
        return self


class ScheduleConfig(Section):
    """Learning rate of the coefficients over the run: a warmup, then a shape."""

    name: Literal["cosine", "linear", "step", "constant"] = Field("cosine", description="Shape after the warmup.")
    warmup: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.2, description="Part of all steps in which the rate rises linearly."
    )
    final: Annotated[float, Field(ge=0, le=1)] = Field(
        0.0, description="Part of the rate left at the end (cosine, linear)."
    )
    every: PositiveInt | None = Field(None, description="`step`: steps between two cuts of the rate.")
    factor: Annotated[float, Field(gt=0, lt=1)] = Field(0.1, description="`step`: what one cut multiplies the rate by.")

    @_model_validator(mode="after")
    def _step_needs_every(self) -> "ScheduleConfig":
        if self.name == "step" and self.every is None:
            raise ValueError("schedule 'step' needs `every`: the number of steps between two cuts")
        return self


class TaskConfig(BaseModel):
    """Model, data and loss: a task that ships, or `package.module:function`; every further key is an option of it."""

    model_config = ConfigDict(extra="allow", frozen=True)

    name: str = Field(
        description="`causal_lm`, `sequence_classification`, `image_classification`, or `package.module:function` of a "
        "function that takes the further keys and returns a Task."
    )

    @property
    def options(self) -> dict[str, Any]:
        """What the task's own constructor is called with."""
        return dict(self.model_extra or {})


class RunConfig(TwaConfig):
    """One config-driven run: `twa-scale run CONFIG`."""

    candidates: str | list[str] = Field(description="Glob or list of paths of the candidates, in training order.")
    task: TaskConfig = Field(description="Model, data and loss.")
    output: str = Field(description="Directory of the run: its state, metrics, pictures and the exported average.")
    engine: Literal["auto", "plain", "ddp", "fsdp2"] = Field(
        "auto", description="How the model is held: `auto` shards it with FSDP2 when there are several ranks."
    )
    precision: Literal["float32", "bfloat16"] = Field(
        "float32", description="Type of forward and backward computation."
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="`auto` takes the GPU of the rank when there is one."
    )
    split: str = Field(
        "train", description="Data that the coefficients are trained on: `train` (TWA-t), `validation` (TWA-v)."
    )
    steps: PositiveInt | None = Field(None, description="Coefficient updates; give this or `epochs`.")
    epochs: PositiveFloat | None = Field(None, description="Passes over the split; give this or `steps`.")
    batch_size: PositiveInt = Field(
        32, description="Examples per update, over all ranks: the same run on any number of ranks."
    )
    micro_batch_size: PositiveInt | None = Field(
        None, description="Examples per rank and backward pass; gradients are accumulated in coefficient space."
    )
    schedule: ScheduleConfig = Field(default_factory=ScheduleConfig, description="Learning rate over the run.")
    seed: int = Field(0, description="Seed of the data order and of dropout.")
    log_every: PositiveInt = Field(1, description="Steps between two lines of metrics.jsonl.")
    evaluate_every: PositiveInt | None = Field(None, description="Steps between two evaluations on `evaluate_split`.")
    evaluate_split: str = Field("validation", description="Held-out data of the evaluations.")
    evaluate_batches: PositiveInt | None = Field(
        None, description="Batches per evaluation; the whole split when not given."
    )
    checkpoint_every: PositiveInt | None = Field(None, description="Steps between two saves of the run state.")
    recalibrate_batches: PositiveInt = Field(
        50, description="Batches for BatchNorm statistics, when the model has them."
    )
    resume: bool = Field(True, description="Continue from the run state in `output` when there is one.")
    max_shard_size: str = Field("5GB", description="Largest file of the exported average.")

    @_model_validator(mode="after")
    def _steps_or_epochs(self) -> "RunConfig":
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give exactly one of `steps` and `epochs`")
        return self


def _ema_decay(center: str) -> float:
    kind, _, decay = center.partition(":")
    try:
        value = float(decay)
    except ValueError:
        value = -1.0
    if kind != "ema" or not 0 < value < 1:
        raise ValueError(
            f"{center!r} is not a center; use mean, ema:DECAY with 0 < DECAY < 1, linear, minus-sqrt, first, last, "
            "the index of a candidate, or one weight per candidate"
        )
    return value


def center_weights(center: Center, n: int) -> list[float]:
    """Return the weights b_1..b_n (sum 1) of the center c = sum_i b_i w_i, candidates in training order.

    `ema:d` weighs candidate i by d^(n-i); `linear` and `minus-sqrt` are the averages that a learning rate decayed by
    that shape would have made (WSM, arXiv 2507.17634): candidate i enters with the drop of the rate at i. A linear
    decay drops evenly, so for evenly spaced candidates `linear` is their mean.

    Raises:
        ConfigError: an index out of range, or weights that are not n numbers of sum 1.
    """
    if center == "first":
        center = 0
    elif center == "last":
        center = n - 1
    if isinstance(center, int):
        i = candidate_index(center, n, "center")
        return [float(j == i) for j in range(n)]
    if isinstance(center, list):
        if len(center) != n or not abs(sum(center) - 1) <= 1e-6:  # also for NaN
            raise ConfigError(
                f"center: {len(center)} weights of sum {sum(center):g} for {n} candidates; give one weight for "
                "each, of sum 1."
            )
        return [float(b) for b in center]
    if center == "mean":
        return [1 / n] * n
    if center in ("linear", "minus-sqrt"):
        power = 1.0 if center == "linear" else 0.5
        # rate(t) = 1 - t^power at t = 0, 1/n, ..., 1; candidate i carries the drop of the rate that follows it
        return [((i + 1) / n) ** power - (i / n) ** power for i in range(n)]
    decay = _ema_decay(center)
    raw = [decay ** (n - 1 - i) for i in range(n)]
    return [value / sum(raw) for value in raw]


def candidate_index(index: str | int, n: int, key: str) -> int:
    """Resolve `first`, `last` or an index (negative counts from the end) to 0..n-1.

    Raises:
        ConfigError: out of range.
    """
    if isinstance(index, str):
        return {"first": 0, "last": n - 1}[index]
    if not -n <= index < n:
        raise ConfigError(f"{key}: there is no candidate {index}; {n} candidates have indices 0 to {n - 1}.")
    return index % n


class _Loader(yaml.SafeLoader):
    """YAML 1.2 floats: `3e-3` is a number, which YAML 1.1 reads as text."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?$|^[-+]?\.(inf|Inf|INF)$|^\.(nan|NaN|NAN)$"),
    list("-+0123456789."),
)


def load_config(path: str | Path, overrides: list[str] | None = None) -> RunConfig:
    """Read a YAML or JSON file, apply dotted overrides (`optimizer.lr=3e-3`), and validate.

    Raises:
        ConfigError: an unreadable file, a malformed override, an unknown key (with the nearest valid one), a bad value.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
        # YAML takes JSON as it is, but for tabs.
        data = json.loads(text) if path.suffix == ".json" else yaml.load(text, Loader=_Loader)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}.") from error
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"{path}: is not valid {'JSON' if path.suffix == '.json' else 'YAML'}: {error}") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: holds {type(data).__name__}, not a mapping of keys to values.")
    for override in overrides or []:
        _override(data, override)
    return validated(RunConfig, data, str(path))


def _override(data: dict[str, Any], override: str) -> None:
    path, equals, value = override.partition("=")
    *parents, key = path.split(".")
    if not equals or not all((*parents, key)):
        raise ConfigError(f"override {override!r}: write it as key=value or section.key=value.")
    node = data
    for parent in parents:
        node = node.setdefault(parent, {})
        if not isinstance(node, dict):
            raise ConfigError(f"override {override!r}: {parent!r} holds {node!r}, which has no keys.")
    try:
        node[key] = yaml.load(value, Loader=_Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"override {override!r}: its value is not valid YAML: {error}") from error


def validated(model: type[M], data: "M | dict[str, Any] | None", where: str = "config") -> M:
    """Return `data` as a `model`, or say every wrong key and value in one ConfigError."""
    if isinstance(data, model):
        return data
    try:
        return model.model_validate(data or {})
    except ValidationError as error:
        lines = [_explain(model, dict(e)) for e in error.errors()]
        raise ConfigError(f"{where}: " + "; ".join(dict.fromkeys(lines))) from None


_BRANCHES = ("str", "int", "float")


def _explain(model: type[BaseModel], error: dict[str, Any]) -> str:
    location: tuple[str | int, ...] = error["loc"]
    # Beside keys and indices pydantic names the branches of a union: `str`, `list[float]`.
    parts = [part for part in location if isinstance(part, int) or (part.isidentifier() and part not in _BRANCHES)]
    key = ".".join(map(str, parts))
    if error["type"] == "extra_forbidden":
        key = ".".join(map(str, location))
        known = _keys(model, location[:-1])
        nearest = get_close_matches(str(location[-1]), known, n=1, cutoff=0.4)
        hint = f"did you mean {nearest[0]!r}?" if nearest else f"known keys: {', '.join(sorted(known))}"
        return f"unknown key {key!r}; {hint}"
    message = error["msg"].removeprefix("Value error, ")
    given = "" if error["type"] in ("missing", "value_error") else f" (got {error['input']!r})"
    return f"{key}: {message}{given}" if key else message


def _keys(model: type[BaseModel], location: tuple[str | int, ...]) -> list[str]:
    for part in location:
        field = model.model_fields.get(str(part))
        if field is None:
            return []
        nested = [t for t in _types(field.annotation) if isinstance(t, type) and issubclass(t, BaseModel)]
        if not nested:
            return []
        model = nested[0]
    return list(model.model_fields)


def _types(annotation: Any) -> list[Any]:
    return list(get_args(annotation)) if get_origin(annotation) in (Union, UnionType) else [annotation]


def dump(config: BaseModel) -> str:
    """Return the resolved configuration as JSON, every default filled in."""
    return json.dumps(config.model_dump(mode="json"), indent=2) + "\n"
