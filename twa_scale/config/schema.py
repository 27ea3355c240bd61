"""What a user can set, with the defaults and the meaning of every key."""

import re
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, PositiveFloat, field_validator, model_validator

from twa_scale.config.center import Center, check_index, of_sum_one, parse_center
from twa_scale.config.kinds import BasisName, EngineName, PackedDeltas, StoreName, store_kind
from twa_scale.config.optimizers import check_name, check_options
from twa_scale.config.section import Count, Directory, Integer, Section
from twa_scale.config.select import SelectConfig

TIMEOUT = 600.0
"""Seconds that ranks wait for each other, when they meet and in every collective."""


class OptimizerConfig(Section):
    """The optimizer of the coefficients: a class of torch.optim; every further key goes to its constructor."""

    model_config = ConfigDict(extra="allow")

    name: str = Field(
        "adamw",
        description="Class of torch.optim, in any case: `adamw`, `sgd`, ..; not `lbfgs` nor `sparseadam`.",
    )
    lr: PositiveFloat = Field(0.03, description="Learning rate, in the units that `units` names.")

    @field_validator("name")
    @classmethod
    def _known_name(cls, name: str) -> str:
        check_name(name)
        return name

    @model_validator(mode="after")
    def _known_options(self) -> "OptimizerConfig":
        check_options(self.name, self.model_extra or {})
        return self

    @property
    def options(self) -> dict[str, Any]:
        """Constructor arguments beside lr. AdamW's own default decay would pull the average to the center: 0 here."""
        extra = dict(self.model_extra or {})
        if self.name.lower() == "adamw":
            extra.setdefault("weight_decay", 0.0)
        return extra


class TwaConfig(Section):
    """How the average is parametrized and trained; the `config` of `twa_scale.attach`."""

    basis: BasisName = Field(
        "normalized",
        description="What the coefficients multiply: `normalized` deltas (TWA v4), an `orthonormal` basis of the "
        "candidates (TWA, ICLR 2023), leading `pca` directions (DLDR), or softmax weights on the `simplex` (learned "
        "soup).",
    )
    groups: Literal["global", "block", "tensor"] | list[str] = Field(
        "global",
        description="Tensors that share one coefficient per candidate: all of them, one group per `block` or "
        "`tensor`, or one group per regular expression of a list (the first that is found in the name wins; the "
        "others share a group).",
    )
    center: Center = Field(
        "mean",
        description="Fixed-weight average that training starts around: `mean`, `ema:0.9` (candidate i of n has the "
        "weight 0.9^(n-i), over the sum of these), `ema-torch:0.9` (torch's EMA over the candidates: the first has "
        "0.9^(n-1), the others (1-0.9) 0.9^(n-i)), `lawa:K` (the mean of the last K), `linear`, `minus-sqrt` (WSM's "
        "decay shapes), `first`, `last`, the index of a candidate, or one weight per candidate, of sum 1.",
    )
    units: Literal["delta", "weight"] = Field(
        "delta",
        description="`delta` scales the basis of a group by its mean delta norm, so that one learning rate means the "
        "same on every model; `weight` leaves unit-norm basis vectors, as published.",
    )
    start: Literal["center", "first", "last", "best"] | int = Field(
        "center",
        description="Where the coefficients start: at the `center`, or at a candidate (`first`, `last`, an index). "
        "Runs take `best`, too: of the averages that need no training, the one with the best evaluation on "
        "`evaluate_split`. They are `center`, `last`, `mean`, `lawa:2`, `lawa:4`, .., `ema:0.8`, `ema:0.9`, "
        "`ema:0.95` and `minus-sqrt`; each costs one evaluation.",
    )
    store: StoreName = Field(
        "dense32",
        description="How the deltas are held beside the weights: float32, bfloat16, codes of 8 to 1 bits with one "
        "scale a block, or not at all: `mapped` takes them from the candidates' files.",
    )
    coding: Literal["auto", "increments", "center"] = Field(
        "auto",
        description="What packed stores hold codes of: deltas to the `center`; or `increments`, each candidate less "
        "what codes made of its neighbour, for candidates of one run, in training order. `auto` codes a sample both "
        "ways and takes the more exact. Coefficients mean the same with both.",
    )
    store_device: Literal["auto", "cpu"] = Field(
        "auto",
        description="Where the store lies: `auto` is beside the weights; with `cpu` a model on a GPU leaves it in "
        "page-locked host memory, and computes with pieces of 64 MiB that are copied over meanwhile.",
    )
    combine: Literal["step", "forward"] = Field(
        "step",
        description="When the weights are written: at the `step`; or, with FSDP2, beside the `forward` pass, each unit "
        "by the time it is gathered, which pays where a GPU's store is in host memory.",
    )
    kernels: Literal["auto", "torch", "numba", "triton"] = Field(
        "auto",
        description="What computes on the store: `auto` takes `numba` on a CPU and `triton` on a GPU where they are "
        "installed, `torch` otherwise.",
    )
    read_chunk: Annotated[Integer, Field(ge=4096)] = Field(
        1 << 20,
        description="Bytes of one read of a candidate. Larger ones suit network file systems; many candidates share "
        "128 MiB of buffers, and get less each.",
    )
    reads_in_flight: Annotated[Integer, Field(ge=1, le=256)] = Field(
        8, description="Candidates that a rank reads at the same time, while it works on what it has read."
    )
    comm: Literal["auto", "nccl", "gloo", "mpi"] = Field(
        "auto",
        description="What sums the coefficient gradients over the ranks: `auto` is the model's own process group, or "
        "MPI where `mpirun` has started ranks that have none.",
    )
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig, description="Optimizer of the coefficients.")
    max_grad_norm: PositiveFloat | None = Field(None, description="Clip the coefficient gradient to this norm.")
    max_weight_grad_norm: PositiveFloat | None = Field(
        None,
        description="Clip the gradient of all trainable weights to this norm before it is projected, as "
        "`torch.nn.utils.clip_grad_norm_` would on one process. Models whose gradients are otherwise freed in backward "
        "(plain, FSDP2) keep them until the step.",
    )
    num_components: Count | None = Field(
        None, description="Number of directions that `pca` keeps; all that are not numerically zero when not given."
    )
    select: SelectConfig = Field(
        default_factory=SelectConfig, description="Which of the candidates are taken, and in which order."
    )
    include: list[str] = Field([], description="Regular expressions of tensor names to train; all when empty.")
    exclude: list[str] = Field([], description="Regular expressions of tensor names to leave at the center.")
    ignore: list[str] = Field([], description="Regular expressions of candidate tensors that the model does not have.")
    missing: Literal["auto", "error", "keep"] = Field(
        "auto",
        description="Tensors of the model that no candidate has: an `error`, or they `keep` the value that the model "
        "has, and exports lack them. `auto`: an error, but for the base model of an adapter (LoRA), whose candidates "
        "are adapters.",
    )
    space: Literal["auto", "factors", "product"] = Field(
        "auto",
        description="What is averaged of LoRA adapters: the `factors` A and B one by one, or each `product` B A, with "
        "factors of rank sum(r_i). `auto` is `factors`, and says so.",
    )
    weights_key: str | None = Field(
        None,
        description="Where the weights are in candidates that hold several sets, with dots between keys: `model_ema`, "
        "`ema.state_dict`, or what names begin with; under `state_dict`, `model` and other usual keys when not given.",
    )
    rename: dict[str, str] = Field(
        {},
        description="Regular expressions, and what takes their place in the names of candidates, in this order, where "
        "the model's names differ: `{'^backbone[.]': 'encoder.'}`; `{'^': 'model.'}` adds a prefix. What transformers "
        "renames when it loads one of its models needs no entry. Exports have the candidates' own names.",
    )
    prefix: str | None = Field(
        None,
        description="What the names of candidates have before those of the model, as `model.`; other tensors are not "
        "read. When not given, a prefix with which every parameter is found is taken off, or put before the names.",
    )
    carry_code: bool = Field(
        False,
        description="Copy code of the last candidate's directory, such as `*.py` files, into exports, beside its other "
        "small files. Loaders may run it.",
    )
    buffers: Literal["average", "mean", "first", "last"] | int = Field(
        "average",
        description="Floating point buffers. `average`: running statistics (`running_mean`, `running_var`) are "
        "averaged with the weights of `center`, others are the last candidate's; `mean`: statistics are averaged "
        "uniformly; or all are those of one candidate. Integers are always the last candidate's.",
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

    @field_validator("rename")
    @classmethod
    def _renamings(cls, value: dict[str, str]) -> dict[str, str]:
        for pattern, replacement in value.items():
            try:
                re.compile(pattern).sub(replacement, "")
            except (re.error, IndexError) as error:
                raise ValueError(f"{pattern!r}: {replacement!r} cannot be used: {error}") from None
        return value

    @field_validator("center")
    @classmethod
    def _known_center(cls, center: Center) -> Center:
        center = parse_center(center)
        if isinstance(center, int):
            check_index(center)
        return of_sum_one(center) if isinstance(center, list) else center

    @field_validator("start", "buffers")
    @classmethod
    def _known_index(cls, value: str | int) -> str | int:
        check_index(value)
        return value

    @model_validator(mode="after")
    def _increments_need_codes(self) -> "TwaConfig":
        if self.coding == "increments" and not isinstance(store_kind(self.store), PackedDeltas):
            raise ValueError(
                f"coding 'increments' is for packed stores; the store is {self.store!r}. Use packed8, packed4, packed2 "
                "or packed1, or leave `coding` out"
            )
        return self

    @model_validator(mode="after")
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
    every: Count | None = Field(None, description="`step`: steps between two cuts of the rate.")
    milestones: list[Annotated[float, Field(gt=0, lt=1)]] = Field(
        [], description="`step`: parts of the run after which the rate is cut, in place of `every`: `[0.5, 0.75]`."
    )
    factor: Annotated[float, Field(gt=0, lt=1)] = Field(0.1, description="`step`: what one cut multiplies the rate by.")

    @model_validator(mode="after")
    def _step_knows_its_cuts(self) -> "ScheduleConfig":
        if self.name == "step" and (self.every is None) == (not self.milestones):
            raise ValueError("schedule 'step' needs `every` (steps between cuts) or `milestones` (parts of the run)")
        return self


class TaskConfig(Section):
    """Model, data and loss: a task that ships, or `package.module:function`; every further key is an option of it."""

    model_config = ConfigDict(extra="allow")

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
    output: Directory = Field(
        description="Directory of the run: its state, metrics, pictures and the exported average."
    )
    engine: Literal["auto", EngineName] = Field(
        "auto",
        description="How the model is held: `auto` shards it with FSDP2 when there are several ranks; `zero1` to "
        "`zero3` by DeepSpeed.",
    )
    deepspeed: dict[str, Any] | None = Field(
        None, description="`zero1` to `zero3`: what DeepSpeed's JSON holds; batch sizes and stage follow from the run."
    )
    pods: Count = Field(
        1,
        description="Cut the ranks into this many groups, in order, that each hold the whole average with `engine` and "
        "exchange only coefficient gradients: for slow links between them.",
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
    steps: Count | None = Field(None, description="Coefficient updates; give this or `epochs`.")
    epochs: PositiveFloat | None = Field(None, description="Passes over the split; give this or `steps`.")
    batch_size: Count = Field(
        32, description="Examples per update, over all ranks: the same run on any number of ranks."
    )
    micro_batch_size: Count | None = Field(
        None, description="Examples per rank and backward pass; gradients are accumulated in coefficient space."
    )
    schedule: ScheduleConfig = Field(default_factory=ScheduleConfig, description="Learning rate over the run.")
    seed: Annotated[Integer, Field(ge=0, lt=2**32)] = Field(0, description="Seed of the data order and of dropout.")
    log_every: Count = Field(1, description="Steps between two lines of metrics.jsonl.")
    evaluate_every: Count | None = Field(None, description="Steps between two evaluations on `evaluate_split`.")
    evaluate_split: str = Field("validation", description="Held-out data of the evaluations.")
    evaluate_batches: Count | None = Field(None, description="Batches per evaluation; the whole split when not given.")
    compare: bool = Field(
        True,
        description="Evaluate the last candidate and the center, too, when the run ends: two more evaluations, forward "
        "passes only.",
    )
    keep: Literal["best", "last"] = Field(
        "best",
        description="What is exported: the `best` average of all evaluations of `evaluate_split`, that of step 0 "
        "included, by the lowest `loss` or what the task says; or that of the `last` step.",
    )
    checkpoint_every: Count | None = Field(50, description="Steps between two saves of the run state (kilobytes).")
    recalibrate_batches: Count = Field(50, description="Batches for BatchNorm statistics, when the model has them.")
    timeout: PositiveFloat = Field(
        TIMEOUT,
        description="Seconds that ranks wait for each other, when they meet and in every collective; then the run ends "
        "with an error that names the rank that is missing.",
    )
    resume: bool = Field(True, description="Continue from the run state in `output` when there is one.")
    max_shard_size: str = Field("5GB", description="Largest file of the exported average.")

    @field_validator("deepspeed")
    @classmethod
    def _mappings(cls, value: dict[str, Any] | None) -> dict[str, Any] | None:
        for key in ("zero_optimization", "bf16", "fp16", "torch_autocast"):
            if not isinstance((value or {}).get(key, {}), dict):
                raise ValueError(f"{key!r} has to be a mapping of keys to values; leave it out, or give one")
        return value

    @model_validator(mode="after")
    def _steps_or_epochs(self) -> "RunConfig":
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give exactly one of `steps` and `epochs`")
        return self
