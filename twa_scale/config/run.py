"""The settings of `twa-scale run`: those of its average, and of the model, the data and the training."""

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, PositiveFloat, field_validator, model_validator

from twa_scale.config.average import TwaConfig
from twa_scale.config.kinds import EngineName
from twa_scale.config.schedule import ScheduleConfig
from twa_scale.config.section import Count, Directory, Integer, Loggers, Section

TIMEOUT = 600.0
"""The time in seconds that ranks wait for each other, at the rendezvous and in every collective."""


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
        "train", description="Split on which the coefficients are trained: `train` (TWA-t), `validation` (TWA-v)."
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
        ["tensorboard"],
        description="Additional loggers of the metrics: `tensorboard`, `csv`, `wandb`, `mlflow`; `[]`: none.",
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
            raise ValueError("give exactly one of `steps` and `epochs`; leave the other one out, or set it to null")
        return self

    @model_validator(mode="after")
    def _auto_needs_held_out_data(self) -> "RunConfig":
        if self.optimizer.lr == "auto" and self.evaluate_split == self.split:
            raise ValueError(
                f"optimizer.lr 'auto' compares rates on held-out data, but evaluate_split {self.evaluate_split!r} is "
                "the split on which the coefficients are trained; give another `split` or `evaluate_split`, or a "
                "number for optimizer.lr"
            )
        return self
