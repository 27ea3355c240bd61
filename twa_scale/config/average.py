"""The settings of an average, for `attach` and for runs: every key with its type, default and description."""

import re
from typing import Annotated, Any, Literal

from pydantic import Field, PositiveFloat, field_validator, model_validator
from typing_extensions import Self

from twa_scale.config.center import Center, check_index, of_sum_one, parse_center
from twa_scale.config.kinds import BasisName, PackedDeltas, RowDtype, StoreName, store_kind
from twa_scale.config.optimizers import RATES, OptimizerConfig
from twa_scale.config.recipes import RecipeName, filled
from twa_scale.config.section import Count, Integer, Section
from twa_scale.config.select import SelectConfig


class TwaConfig(Section):
    """The parametrization and the training of the average; the `config` of `twa_scale.attach`."""

    recipe: RecipeName | None = Field(
        None,
        description="Named settings for a use, which replace the defaults of this page: `tail` (the end of a training "
        "run), `head` (its first half), `soup` (fine-tuned models). `docs/how-to/settings.md` lists them. "
        "A recipe does not change keys that are set.",
    )
    basis: BasisName = Field(
        "normalized",
        description="Directions that the coefficients multiply: `normalized` deltas (TWA, journal version), an "
        "`orthonormal` basis of the candidates (TWA, ICLR 2023), or leading `pca` directions (DLDR). `simplex` trains "
        "softmax weights of the candidates (learned soup).",
    )
    groups: Literal["global", "block", "tensor", "expert", "block+row", "tensor+row"] | list[str] = Field(
        "global",
        description="Tensors that share one coefficient per candidate: all (`global`), those of a `block`, each "
        "`tensor`, or one group per regular expression of a list. The first expression found in a name counts; "
        "tensors that match none share a group. Names are those of the model. `expert` has one coefficient for each "
        "expert of a mixture of experts, also where the model stacks experts in one tensor; other tensors have that of "
        "their block. With `block+row` and `tensor+row`, each "
        "row of a matrix (output channel of a convolution, row of an embedding) has its own correction, which is "
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
        "`mean`, `lawa:2`, `lawa:4`, .., `ema:0.8`, `ema:0.9`, `ema:0.95` and `minus-sqrt`. From eight "
        "batches on, all are evaluated on every fourth one, and the best three of them on all.",
    )
    store: StoreName = Field(
        "dense32",
        description="Number format of the deltas in memory: float32, bfloat16, or codes of 8 to 1 bits with one scale "
        "per block. `mapped` stores no deltas and reads the files of the candidates in every step.",
    )
    coding: Literal["auto", "increments", "center"] = Field(
        "auto",
        description="What packed stores encode: deltas to the `center`, or `increments`, each candidate minus the "
        "rounded form of its neighbor, for candidates of one run in training order. `auto` encodes a sample with both "
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
    row_exchange: RowDtype = Field(
        "float32",
        description="Type of the gradients of corrections per row (`groups: tensor+row`) that pods exchange. With "
        "`bfloat16` and `int8` they are rounded; rounding errors are added to the next gradient.",
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
    select: SelectConfig = Field(default_factory=SelectConfig, description="Range and order of the candidates.")
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
        """Return the keys that a recipe may set. `start` is left out, because it needs the evaluations of a run."""
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
        if not self.has_rows and self.row_exchange != "float32":
            raise ValueError(f"row_exchange is for groups tensor+row and block+row; groups is {self.groups!r}")
        return self

    @property
    def has_rows(self) -> bool:
        """Whether single rows of matrices have corrections."""
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
        if self.recipe is not None and "lr" not in self.optimizer.model_fields_set:
            raise ValueError(
                f"optimizer.lr: recipe {self.recipe!r} has no learning rate for {self.optimizer.name} with units "
                f"{self.units}; give a number, or leave out optimizer.name and units"
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
