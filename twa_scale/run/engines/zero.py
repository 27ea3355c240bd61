"""Engines `zero1`, `zero2` and `zero3`: DeepSpeed."""

import os
import sys
from contextlib import AbstractContextManager, nullcontext, redirect_stdout
from importlib import import_module
from typing import Any, ClassVar

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from twa_scale.config import RunConfig
from twa_scale.engines import ParameterInfo
from twa_scale.engines.zero import stateless_optimizer
from twa_scale.errors import ConfigError
from twa_scale.ranks import World
from twa_scale.run.batches import cut
from twa_scale.run.engines.own_values import candidates_leave_values
from twa_scale.run.engines.run_engine import ELEMENT, Parameters, RunEngine, equal_part, largest, total
from twa_scale.run.tasks import Task

# Of ZeRO-3's own defaults some hold a model of a billion parameters whole between forward and backward.
ZERO = {
    "reduce_bucket_size": 20_000_000,
    "stage3_prefetch_bucket_size": 5_000_000,
    "stage3_max_reuse_distance": 0,
    "stage3_param_persistence_threshold": 10_000,
}


class Zero(RunEngine):
    """What the stages share: float32 partitions beside the weights that DeepSpeed computes with."""

    allows_pods = False
    counts_micro_batches = True
    stage: ClassVar[int]

    def build(self, task: Task, world: World, device: torch.device, mesh: DeviceMesh | None = None) -> nn.Module:
        """Return the task's model in a DeepSpeedEngine.

        Raises:
            ConfigError: DeepSpeed is not installed, or its JSON and the run disagree.
        """
        settings = zero_settings(self.config, self.stage, world.size)
        os.environ.setdefault("LOCAL_RANK", str(world.local_rank))  # DeepSpeed asks for it whoever launched us
        if device.type == "cpu":
            os.environ.setdefault("DS_ACCELERATOR", "cpu")
        deepspeed = load_deepspeed()
        deepspeed.init_distributed(verbose=False)  # takes the group that is there; else zero.Init would count one rank
        model = self._model(deepspeed, task, device, settings)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        engine: nn.Module = deepspeed.initialize(model=model, optimizer=stateless_optimizer(trained), config=settings)[
            0
        ]
        return engine

    def _model(self, deepspeed: Any, task: Task, device: torch.device, settings: dict[str, Any]) -> nn.Module:
        return task.model().to(device)

    def autocast(self, device: torch.device) -> AbstractContextManager[object]:
        """Return no context: DeepSpeed casts by its own settings."""
        return nullcontext()

    def backward(self, model: nn.Module, loss: torch.Tensor) -> None:
        """Run DeepSpeed's backward pass, without its division by the number of micro-batches."""
        model.backward(loss, scale_wrt_gas=False)  # type: ignore[operator]

    def load_libraries(self) -> None:
        """Import DeepSpeed and what its stages import later."""
        load_deepspeed()
        for name in ("deepspeed.runtime.zero.stage3", "deepspeed.module_inject", "torch._dynamo"):
            import_module(name)

    def owned_elements(self, info: ParameterInfo) -> int:
        """Return the elements of the first of equal parts; ZeRO-1 and 2 divide all at once, which comes to the same."""
        return equal_part(info, self.ranks)

    def weight_bytes(self, parameters: Parameters) -> int:
        """Return the bytes of the weights that DeepSpeed computes with."""
        return total(parameters) * self._compute_bytes

    def partition_bytes(self, parameters: Parameters) -> dict[str, int]:
        """Return the partitions, which exist also where DeepSpeed computes in float32."""
        owned = sum(map(self.owned_elements, parameters.values()))
        return {
            "float32 partition (DeepSpeed)": owned * ELEMENT,
            "gradient partition (DeepSpeed)": owned * self._compute_bytes,
        }

    def wire_bytes(self, model: nn.Module, parameters: Parameters) -> dict[str, int]:
        """Return the all-reduce of the gradients and the all-gather of the weights."""
        gradients = total(parameters, trainable=True) * self._compute_bytes
        return {
            "gradient reduction (DeepSpeed)": self.all_reduced(gradients),
            "weights all-gather (twa_scale)": self.gathered(total(parameters) * self._compute_bytes),
        }

    @property
    def _compute_bytes(self) -> int:
        low = any((self.config.deepspeed or {}).get(key, {}).get("enabled") for key in ("bf16", "fp16"))
        return 2 if low else ELEMENT

    def _setting(self, name: str) -> int:
        return int({**ZERO, **(self.config.deepspeed or {}).get("zero_optimization", {})}[name])

    def _bucket(self, parameters: Parameters) -> int:
        return 2 * min(self._setting("reduce_bucket_size"), total(parameters))


class Zero1(Zero):
    """Optimizer states are partitioned; every rank has all gradients until they are reduced at the end."""

    stage = 1

    def transient_bytes(self, model: nn.Module, parameters: Parameters) -> dict[str, int]:
        """Return all gradients and the buckets in which they are reduced."""
        return {"gradients": total(parameters) * ELEMENT, "reduce buckets": self._bucket(parameters) * ELEMENT}


class Zero2(Zero):
    """Gradients are partitioned too."""

    stage = 2

    def transient_bytes(self, model: nn.Module, parameters: Parameters) -> dict[str, int]:
        """Return the buckets in which gradients are reduced."""
        return {"reduce buckets": self._bucket(parameters) * ELEMENT}


class Zero3(Zero):
    """Parameters are partitioned too. No rank ever holds a whole model whose values candidates give."""

    stage = 3

    def _model(self, deepspeed: Any, task: Task, device: torch.device, settings: dict[str, Any]) -> nn.Module:
        if candidates_leave_values(self.config):  # a model that is partitioned from the start could not load them
            return super()._model(deepspeed, task, device, settings)
        with deepspeed.zero.Init(config_dict_or_path=settings):
            return task.model()

    def weight_bytes(self, parameters: Parameters) -> int:
        """Return the bytes of the partition that DeepSpeed computes with."""
        return sum(map(self.owned_elements, parameters.values())) * self._compute_bytes

    def transient_bytes(self, model: nn.Module, parameters: Parameters) -> dict[str, int]:
        """Return gathered parameters, and gradients that are not reduced yet."""
        gathered = min(total(parameters), largest(parameters) + self._setting("stage3_prefetch_bucket_size"))
        # Gathered flat, then copied; the bucket is put into the order of the ranks, then reduced to a part of it.
        return {
            "gathered parameters": 2 * gathered * self._compute_bytes,
            "reduce buckets": 5 * self._bucket(parameters) // 4 * ELEMENT,
        }

    def wire_bytes(self, model: nn.Module, parameters: Parameters) -> dict[str, int]:
        """Return the scatter of the gradients, and the gathers of the parameters in forward and in backward."""
        reduced = self.all_reduced(total(parameters, trainable=True) * self._compute_bytes)
        return {
            "gradient reduction (DeepSpeed)": reduced // 2,
            "parameter all-gathers (DeepSpeed)": 2 * self.gathered(total(parameters) * self._compute_bytes),
        }


def zero_settings(config: RunConfig, stage: int, ranks: int) -> dict[str, Any]:
    """Return what `deepspeed.initialize` gets: the user's JSON, completed and checked against the run.

    Blocks that only concern training by `engine.step` (`optimizer`, `scheduler`) are left out.

    Raises:
        ConfigError: a number or a stage on which the two disagree.
    """
    given = {k: v for k, v in (config.deepspeed or {}).items() if k not in ("optimizer", "scheduler")}
    micro, accumulate = cut(config.batch_size, config.micro_batch_size, ranks)
    batch = {
        "train_batch_size": config.batch_size,
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": accumulate,
    }
    for key, value in batch.items():
        if given.get(key, "auto") not in ("auto", value):
            raise ConfigError(
                f"deepspeed.{key} is {given[key]}, but batch_size {config.batch_size} on {ranks} ranks in "
                f"micro-batches of {micro} makes it {value}: leave it out, or make both agree."
            )
    zero = {**ZERO, **given.get("zero_optimization", {})}
    if zero.setdefault("stage", stage) != stage:
        raise ConfigError(
            f"deepspeed.zero_optimization.stage is {zero['stage']}, but engine is {config.engine!r}: leave one out."
        )
    settings = {"zero_allow_untested_optimizer": True, "steps_per_print": None, **given, **batch}
    precisions = ("bf16", "fp16", "torch_autocast")
    if config.precision == "bfloat16" and not any(given.get(key, {}).get("enabled") for key in precisions):
        settings["torch_autocast"] = {"enabled": True, "dtype": "bfloat16"}
    return {**settings, "zero_optimization": zero}


def load_deepspeed() -> Any:
    """Import DeepSpeed.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        with redirect_stdout(sys.stderr):  # where its log goes from then on: our own output may be JSON
            import deepspeed
    except ImportError:
        raise ConfigError("engine: zero1, zero2 and zero3 need DeepSpeed: pip install deepspeed.") from None
    # An all-reduce for inference on CPUs, which DeepSpeed would compile for a minute on the first run of a machine.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed
