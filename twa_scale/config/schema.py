"""The schema of the configuration: every key with its type, default and description."""

import re
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, PositiveFloat, field_validator, model_validator
from typing_extensions import Self

from twa_scale.config.center import Center, check_index, of_sum_one, parse_center
from twa_scale.config.kinds import BasisName, EngineName, PackedDeltas, StoreName, store_kind
from twa_scale.config.optimizers import RATES, OptimizerConfig
from twa_scale.config.recipes import RecipeName, filled
from twa_scale.config.section import Count, Directory, Integer, Loggers, Section
from twa_scale.config.select import SelectConfig

TIMEOUT = 600.0
"""Seconds that ranks wait for each other, at the rendezvous and in every collective."""


class TwaConfig(Section):
    """The parametrization and the training of the average; the `config` of `twa_scale.attach`."""

    recipe: RecipeName | None = Field(
        None,
        description="Named settings for a use, which replace the defaults of this page: `tail` (the end of a training "
        "run), `head` (its first half), `soup` (fine-tuned models). `docs/how-to/settings.md` lists them. "
        "Settings that are given are kept.",
    )
    basis: BasisName = Field(
        "normalized",
        description="Directions that the coefficients multiply: `normalized` deltas (TWA v4), an `orthonormal` basis "
        "of the candidates (TWA, ICLR 2023), or leading `pca` directions (DLDR). `simplex` trains softmax weights of "
        "the candidates (learned soup).",
    )
    groups: Literal["global", "block", "tensor", "expert", "block+row", "tensor+row"] | list[str] = Field(
        "global",
        description="Tensors that share one coefficient per candidate: all (`global`), those of a `block`, each "
        "`tensor`, or one group per regular expression of a list. The first expression found in a name counts; "
        "tensors that match none share a group. Names are those of the model. `expert` has one coefficient for each "
        "expert of a mixture of experts, also where the model stacks experts in one tensor; other tensors have that of "
        "their block. With `block+row` and `tensor+row`, each "
        "row of a matrix (output channel of a convolution, row of an embedding) has a correction of its own, which is "
        "trained at `optimizer.row_lr`; for the bases `normalized` and `pca`.",
    )
    center: Center = Field(
        "mean",
        description="Fixed-weight average around which training starts: `mean`, `ema:0.9` (candidate i of n has the "
        "weight 0.9^(n-i), divided by the sum of these), `ema-torch:0.9` (the EMA of torch: the first candidate has "
        "0.9^(n-1), the others (1-0.9) 0.9^(n-i)), `lawa:K` (the mean of the last K), `linear`, `minus-sqrt` (decay "
        "shapes of WSM), `first`, `last`, the index of a candidate, or one weight per candidate, with sum 1.",
    )
    units: Literal["delta", "weight"] = Field(
        "delta",
        description="`delta` scales the basis of a group by its mean delta norm, so that learning rates are "
        "comparable between models; `weight` uses unit-norm basis vectors, as published.",
    )
    start: Literal["center", "first", "last", "best"] | int = Field(
        "center",
        description="Where the coefficients start: at the `center`, or at a candidate (`first`, `last`, an index). "
        "Runs also accept `best`: the average with the best evaluation on `evaluate_split` among `center`, `last`, "
        "`mean`, `lawa:2`, `lawa:4`, .., `ema:0.8`, `ema:0.9`, `ema:0.95` and `minus-sqrt`; each costs one "
        "evaluation.",
    )
    store: StoreName = Field(
        "dense32",
        description="Number format of the deltas in memory: float32, bfloat16, or codes of 8 to 1 bits with one scale "
        "per block. `mapped` stores no deltas and reads the files of the candidates in every step.",
    )
    coding: Literal["auto", "increments", "center"] = Field(
        "auto",
        description="What packed stores encode: deltas to the `center`, or `increments`, each candidate minus the "
        "rounded form of its neighbour, for candidates of one run in training order. `auto` encodes a sample with both "
        "and uses the more exact one. Coefficients have the same meaning with both.",
    )
    store_device: Literal["auto", "cpu"] = Field(
        "auto",
        description="Device of the store: `auto` is the device of the weights. With `cpu`, the store of a model on a "
        "GPU is in page-locked host memory, and is copied to the GPU in pieces of 64 MiB while it computes.",
    )
    combine: Literal["step", "forward"] = Field(
        "step",
        description="When the weights are written: at the `step`; or, with FSDP2, during the `forward` pass, each "
        "unit before it is gathered, which is faster for a GPU with the store in host memory.",
    )
    kernels: Literal["auto", "torch", "numba", "triton"] = Field(
        "auto",
        description="Library of the kernels: `auto` is `numba` on a CPU and `triton` on a GPU if they are installed, "
        "`torch` otherwise.",
    )
    read_chunk: Annotated[Integer, Field(ge=4096)] = Field(
        1 << 20,
        description="Bytes of one read of a candidate. Larger reads suit network file systems. The buffers of all "
        "candidates have 128 MiB, so reads are smaller with many candidates.",
    )
    reads_in_flight: Annotated[Integer, Field(ge=1, le=256)] = Field(
        8, description="Candidates that a rank reads at the same time, in the background."
    )
    comm: Literal["auto", "nccl", "gloo", "mpi"] = Field(
        "auto",
        description="Library that sums the coefficient gradients over ranks: `auto` is the process group of the model, "
        "or MPI for ranks of `mpirun` without a process group.",
    )
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig, description="Optimizer of the coefficients.")
    max_grad_norm: PositiveFloat | None = Field(None, description="Clip the coefficient gradient to this norm.")
    max_weight_grad_norm: PositiveFloat | None = Field(
        None,
        description="Clip the gradient of all trainable weights to this norm before it is projected, like "
        "`torch.nn.utils.clip_grad_norm_` on one process. Plain and FSDP2 models, which otherwise free gradients in "
        "backward, keep them until the step.",
    )
    num_components: Count | None = Field(
        None, description="Number of directions of `pca`; by default, all that are not numerically zero."
    )
    select: SelectConfig = Field(
        default_factory=SelectConfig, description="Which of the candidates are taken, and in which order."
    )
    include: list[str] = Field(
        [], description="Regular expressions of tensors to train, by their names in the model; all if empty."
    )
    exclude: list[str] = Field(
        [], description="Regular expressions of tensors to leave at the center, by their names in the model."
    )
    ignore: list[str] = Field(
        [],
        description="Regular expressions of tensors that are not read, by their names in the candidates' files, or "
        "else in the model: one line names what only its name in the model leaves out.",
    )
    missing: Literal["auto", "error", "keep"] = Field(
        "auto",
        description="Tensors of the model that no candidate has: `error` refuses them; `keep` keeps their value in the "
        "model, and exports do not have them. `auto` keeps the base model of an adapter (LoRA) if candidates are "
        "adapters, and refuses others.",
    )
    space: Literal["auto", "factors", "product"] = Field(
        "auto",
        description="What is averaged for LoRA adapters: the `factors` A and B separately, or each `product` B A, with "
        "factors of rank sum(r_i). `auto` is `factors`, with a notice.",
    )
    weights_key: str | None = Field(
        None,
        description="Key of the weights in candidates with several sets of weights, with dots between keys: "
        "`model_ema`, `ema.state_dict`, or a prefix of names. By default, usual keys such as `state_dict` and `model`.",
    )
    rename: dict[str, str] = Field(
        {},
        description="Regular expressions and their replacements in tensor names of candidates, applied in order, for "
        "names that differ from the model: `{'^backbone[.]': 'encoder.'}`; `{'^': 'model.'}` adds a prefix. Names "
        "that transformers changes when it loads a model need no entry. Exports have the names of the candidates.",
    )
    prefix: str | None = Field(
        None,
        description="Prefix of the model's names in candidates, such as `model.`; tensors without it are not read. By "
        "default, a prefix is removed or added if all parameters are found with it.",
    )
    carry_code: bool = Field(
        False,
        description="Copy code of the last candidate's directory, such as `*.py` files, into exports, with its other "
        "small files. Loaders may run it.",
    )
    buffers: Literal["average", "mean", "first", "last"] | int = Field(
        "average",
        description="Floating point buffers. `average`: running statistics (`running_mean`, `running_var`) are "
        "averaged with the weights of `center`, others are those of the last candidate; `mean`: statistics are "
        "averaged uniformly; `first`, `last` or an index: all are those of one candidate. Integer buffers are always "
        "those of the last candidate.",
    )

    @model_validator(mode="before")
    @classmethod
    def _recipe_gives_the_rest(cls, data: Any) -> Any:
        return filled(data, cls._of_recipes()) if isinstance(data, dict) else data

    @classmethod
    def _of_recipes(cls) -> set[str]:
        """Return the keys that a recipe may give: `start` is left out, which needs the evaluations of a run."""
        return set(cls.model_fields) - {"start"}

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
    def _rows_need_a_centered_basis(self) -> "TwaConfig":
        if self.has_rows and self.basis not in ("normalized", "pca"):
            raise ValueError(
                f"groups {self.groups!r} is for the bases normalized and pca, whose directions are sums of deltas; the "
                f"basis is {self.basis!r}. Use one of these, or groups without '+row'"
            )
        if self.has_rows and self.optimizer.name.lower() in ("adafactor", "muon"):
            raise ValueError(
                f"optimizer.name {self.optimizer.name!r} computes with whole matrices of coefficients, and rows are "
                "divided over ranks; use adamw or sgd with groups tensor+row and block+row"
            )
        if not self.has_rows and self.optimizer.row_lr is not None:
            raise ValueError(f"optimizer.row_lr is for groups tensor+row and block+row; groups is {self.groups!r}")
        return self

    @property
    def has_rows(self) -> bool:
        """Whether rows of matrices have corrections of their own."""
        return isinstance(self.groups, str) and self.groups.endswith("+row")

    @model_validator(mode="after")
    def _auto_needs_a_usual_rate(self) -> "TwaConfig":
        key = (self.optimizer.name.lower(), self.units)
        if self.optimizer.lr == "auto" and key not in RATES:
            known = ", ".join(f"{name} with units {units}" for name, units in RATES)
            raise ValueError(
                f"optimizer.lr 'auto' needs an optimizer whose usual rate is known: {known}; it is {key[0]} with units "
                f"{key[1]}. Use one of these, or give a number"
            )
        return self

    @model_validator(mode="after")
    def _recipes_have_a_rate(self) -> "TwaConfig":
        key = (self.optimizer.name.lower(), self.units)
        if self.recipe is not None and "lr" not in self.optimizer.model_fields_set and key not in RATES:
            raise ValueError(
                f"optimizer.lr: recipe {self.recipe!r} has no learning rate for {key[0]} with units {key[1]}; give a "
                "number, or leave out optimizer.name and units"
            )
        return self

    @property
    def lr(self) -> float:
        """The learning rate of the coefficients; with `auto`, the usual rate of the optimizer."""
        lr = self.optimizer.lr
        return RATES[self.optimizer.name.lower(), self.units] if lr == "auto" else lr

    @property
    def row_lr(self) -> float:
        """The learning rate of the corrections per row."""
        return self.lr / 10 if self.optimizer.row_lr is None else self.optimizer.row_lr

    def with_lr(self, lr: float) -> Self:
        """Return these settings with another learning rate of the coefficients."""
        return self.model_copy(update={"optimizer": self.optimizer.model_copy(update={"lr": lr})})

    @model_validator(mode="after")
    def _components_need_pca(self) -> "TwaConfig":
        if self.num_components is not None and self.basis != "pca":
            raise ValueError(f"num_components is for basis 'pca'; the basis is {self.basis!r}")
        return self


class ScheduleConfig(Section):
    """The learning rate schedule of the coefficients: a warmup, then a shape."""

    name: Literal["cosine", "linear", "step", "constant"] = Field("cosine", description="Shape after the warmup.")
    warmup: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.2, description="Fraction of all steps in which the rate rises linearly."
    )
    final: Annotated[float, Field(ge=0, le=1)] = Field(
        0.0, description="`cosine`, `linear`: rate at the end, as a fraction of `lr`."
    )
    every: Count | None = Field(None, description="`step`: steps between two decays of the rate.")
    milestones: list[Annotated[float, Field(gt=0, lt=1)]] = Field(
        [], description="`step`: fractions of the run after which the rate decays, instead of `every`: `[0.5, 0.75]`."
    )
    factor: Annotated[float, Field(gt=0, lt=1)] = Field(0.1, description="`step`: factor of the rate at each decay.")

    @model_validator(mode="after")
    def _step_needs_decays(self) -> "ScheduleConfig":
        if self.name == "step" and (self.every is None) == (not self.milestones):
            raise ValueError(
                "schedule 'step' needs `every` (steps between decays) or `milestones` (fractions of the run)"
            )
        return self


class TaskConfig(Section):
    """Model, data and loss: a built-in task, or `package.module:function`. Other keys are options of the task."""

    model_config = ConfigDict(extra="allow")

    name: str = Field(
        description="`causal_lm`, `sequence_classification`, `image_classification`, `object_detection`, or "
        "`package.module:function` of a function that takes the other keys and returns a Task."
    )

    @property
    def options(self) -> dict[str, Any]:
        """The arguments of the task's constructor."""
        return dict(self.model_extra or {})


class RunConfig(TwaConfig):
    """The configuration of `twa-scale run`."""

    candidates: str | list[str] = Field(description="Glob or list of paths of the candidates, in training order.")
    task: TaskConfig = Field(description="Model, data and loss.")
    output: Directory = Field(description="Directory of the run: its state, metrics, plots and the exported average.")
    engine: Literal["auto", EngineName] = Field(
        "auto",
        description="Sharding of the model: `auto` is FSDP2 with several ranks, `plain` with one; `zero1` to `zero3` "
        "use DeepSpeed.",
    )
    deepspeed: dict[str, Any] | None = Field(
        None, description="`zero1` to `zero3`: JSON configuration of DeepSpeed; the run sets batch sizes and stage."
    )
    pods: Count = Field(
        1,
        description="Divide the ranks into this many groups, in order, for slow links between them. Each group holds "
        "the whole average with `engine`, and they exchange only coefficient gradients.",
    )
    precision: Literal["float32", "bfloat16"] = Field(
        "float32", description="Number format of forward and backward passes."
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="`auto` is the GPU of the rank if there is one.")
    split: str = Field(
        "train", description="Split that the coefficients are trained on: `train` (TWA-t), `validation` (TWA-v)."
    )
    steps: Count | None = Field(None, description="Coefficient updates; give this or `epochs`.")
    epochs: PositiveFloat | None = Field(None, description="Passes over the split; give this or `steps`.")
    batch_size: Count = Field(
        32, description="Examples per update over all ranks, so that a run does not depend on the number of ranks."
    )
    micro_batch_size: Count | None = Field(
        None, description="Examples per rank and backward pass; gradients are accumulated in coefficient space."
    )
    schedule: ScheduleConfig = Field(default_factory=ScheduleConfig, description="Learning rate over the run.")
    seed: Annotated[Integer, Field(ge=0, lt=2**32)] = Field(0, description="Seed of the data order and of dropout.")
    log_every: Count = Field(1, description="Steps between two lines of metrics.jsonl.")
    report_to: Loggers = Field(
        ["tensorboard"], description="What else gets the metrics: `tensorboard`, `csv`, `wandb`, `mlflow`; `[]`: none."
    )
    evaluate_every: Count | None = Field(None, description="Steps between two evaluations on `evaluate_split`.")
    evaluate_split: str = Field("validation", description="Held-out data of the evaluations.")
    evaluate_batches: Count | None = Field(
        None, description="Batches of `batch_size` examples per evaluation; by default, the whole split."
    )
    compare: bool | Literal["candidates"] = Field(
        True,
        description="Also evaluate the last candidate and the center at the end of the run: two more evaluations, "
        "forward passes only. `candidates`: every candidate, so that the average is compared with the best one.",
    )
    keep: Literal["best", "last"] = Field(
        "best",
        description="Average to export: the `best` of all evaluations on `evaluate_split`, including step 0, by the "
        "lowest `loss` or the main metric of the task; or that of the `last` step.",
    )
    checkpoint_every: Count | None = Field(50, description="Steps between two saves of the run state (kilobytes).")
    recalibrate_batches: Count = Field(50, description="Batches for BatchNorm statistics, if the model has them.")
    timeout: PositiveFloat = Field(
        TIMEOUT,
        description="Seconds that ranks wait for each other, at the rendezvous and in every collective. Then the run "
        "ends with an error that names the missing rank.",
    )
    resume: bool = Field(True, description="Continue from the run state in `output` if there is one.")
    max_shard_size: str = Field("5GB", description="Largest file of the exported average.")

    @classmethod
    def _of_recipes(cls) -> set[str]:
        return set(cls.model_fields)

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

    @model_validator(mode="after")
    def _auto_needs_held_out_data(self) -> "RunConfig":
        if self.optimizer.lr == "auto" and self.evaluate_split == self.split:
            raise ValueError(
                f"optimizer.lr 'auto' compares rates on held-out data, and evaluate_split {self.evaluate_split!r} is "
                "the split that the coefficients are trained on; give another one, or a number for optimizer.lr"
            )
        return self
