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
from twa_scale.run.batches import divide_batch
from twa_scale.run.engines.own_values import candidates_leave_values
from twa_scale.run.engines.run_engine import ELEMENT, Parameters, RunEngine, equal_part, largest, total
from twa_scale.run.tasks import Task

# With the defaults of ZeRO-3, a model of a billion parameters stays gathered between forward and backward.
ZERO = {
    "reduce_bucket_size": 20_000_000,
    "stage3_prefetch_bucket_size": 5_000_000,
    "stage3_max_reuse_distance": 0,
    "stage3_param_persistence_threshold": 10_000,
}


class Zero(RunEngine):
    """The common part of the stages: weights in the computation dtype, and float32 partitions of them."""

    allows_pods = False
    counts_micro_batches = True
    stage: ClassVar[int]

    def build(self, task: Task, world: World, device: torch.device, mesh: DeviceMesh | None = None) -> nn.Module:
        """Return the task's model in a DeepSpeedEngine.

        Raises:
            ConfigError: DeepSpeed is not installed, or its JSON and the run disagree.
        """
        settings = zero_settings(self.config, self.stage, world.size)
        os.environ.setdefault("LOCAL_RANK", str(world.local_rank))  # DeepSpeed needs it with every launcher
        if device.type == "cpu":
            os.environ.setdefault("DS_ACCELERATOR", "cpu")
        deepspeed = load_deepspeed()
        deepspeed.init_distributed(verbose=False)  # uses the existing group; without it zero.Init counts one rank
        model = self._model(deepspeed, task, device, settings)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        engine: nn.Module = deepspeed.initialize(model=model, optimizer=stateless_optimizer(trained), config=settings)[
            0
        ]
        return engine

    def _model(self, deepspeed: Any, task: Task, device: torch.device, settings: dict[str, Any]) -> nn.Module:
        return task.model().to(device)

    def autocast(self, device: torch.device) -> AbstractContextManager[object]:
        """Return a null context: DeepSpeed casts."""
        return nullcontext()

    def backward(self, model: nn.Module, loss: torch.Tensor) -> None:
        """Run the backward pass of DeepSpeed without its division by the number of micro-batches."""
        model.backward(loss, scale_wrt_gas=False)  # type: ignore[operator]

    def load_libraries(self) -> None:
        """Import DeepSpeed and the modules that its stages import later."""
        load_deepspeed()
        for name in ("deepspeed.runtime.zero.stage3", "deepspeed.module_inject", "torch._dynamo"):
            import_module(name)

    def owned_elements(self, info: ParameterInfo) -> int:
        """Return the number of elements of the first of equal parts, which also holds in sum for ZeRO-1 and ZeRO-2."""
        return equal_part(info, self.ranks)

    def weight_bytes(self, parameters: Parameters) -> int:
        """Return the bytes of the weights in the computation dtype."""
        return total(parameters) * self._compute_bytes

    def partition_bytes(self, parameters: Parameters) -> dict[str, int]:
        """Return the bytes of the partitions, which DeepSpeed also allocates when it computes in float32."""
        owned = sum(map(self.owned_elements, parameters.values()))
        return {
            "float32 partition (DeepSpeed)": owned * ELEMENT,
            "gradient partition (DeepSpeed)": owned * self._compute_bytes,
        }

    def wire_bytes(self, model: nn.Module, parameters: Parameters) -> dict[str, int]:
        """Return the bytes of the all-reduce of gradients and the all-gather of weights."""
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
    """ZeRO-1: optimizer states are partitioned; every rank has all gradients until the reduction at the end."""

    stage = 1

    def transient_bytes(self, model: nn.Module, parameters: Parameters) -> dict[str, int]:
        """Return the bytes of all gradients and of the reduce buckets."""
        return {"gradients": total(parameters) * ELEMENT, "reduce buckets": self._bucket(parameters) * ELEMENT}


class Zero2(Zero):
    """ZeRO-2: gradients are partitioned too."""

    stage = 2

    def transient_bytes(self, model: nn.Module, parameters: Parameters) -> dict[str, int]:
        """Return the bytes of the reduce buckets."""
        return {"reduce buckets": self._bucket(parameters) * ELEMENT}


class Zero3(Zero):
    """ZeRO-3: parameters are partitioned too. The whole model is built only if it keeps its own values."""

    stage = 3

    def _model(self, deepspeed: Any, task: Task, device: torch.device, settings: dict[str, Any]) -> nn.Module:
        if candidates_leave_values(self.config):  # a model that is partitioned at construction cannot load them
            return super()._model(deepspeed, task, device, settings)
        with deepspeed.zero.Init(config_dict_or_path=settings):
            return task.model()

    def weight_bytes(self, parameters: Parameters) -> int:
        """Return the bytes of the rank's partition in the computation dtype."""
        return sum(map(self.owned_elements, parameters.values())) * self._compute_bytes

    def transient_bytes(self, model: nn.Module, parameters: Parameters) -> dict[str, int]:
        """Return the bytes of gathered parameters and of gradients before their reduction."""
        gathered = min(total(parameters), largest(parameters) + self._setting("stage3_prefetch_bucket_size"))
        # Parameters are gathered flat, then copied. A bucket is reordered by rank, then reduced to a fraction.
        return {
            "gathered parameters": 2 * gathered * self._compute_bytes,
            "reduce buckets": 5 * self._bucket(parameters) // 4 * ELEMENT,
        }

    def wire_bytes(self, model: nn.Module, parameters: Parameters) -> dict[str, int]:
        """Return the bytes of the reduce-scatter of gradients, and of the all-gathers in forward and backward."""
        reduced = self.all_reduced(total(parameters, trainable=True) * self._compute_bytes)
        return {
            "gradient reduction (DeepSpeed)": reduced // 2,
            "parameter all-gathers (DeepSpeed)": 2 * self.gathered(total(parameters) * self._compute_bytes),
        }


def zero_settings(config: RunConfig, stage: int, ranks: int) -> dict[str, Any]:
    """Return the configuration for `deepspeed.initialize`: that of the user, completed and checked against the run.

    The blocks `optimizer` and `scheduler`, which only `engine.step` uses, are removed.

    Raises:
        ConfigError: a batch size or the stage differs from that of the run.
    """
    settings_given = {k: v for k, v in (config.deepspeed or {}).items() if k not in ("optimizer", "scheduler")}
    micro, accumulate = divide_batch(config.batch_size, config.micro_batch_size, ranks)
    batch = {
        "train_batch_size": config.batch_size,
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": accumulate,
    }
    for key, value in batch.items():
        if settings_given.get(key, "auto") not in ("auto", value):
            raise ConfigError(
                f"deepspeed.{key} is {settings_given[key]}, but batch_size {config.batch_size} on {ranks} ranks in "
                f"micro-batches of {micro} makes it {value}: leave it out, or make both agree."
            )
    zero = {**ZERO, **settings_given.get("zero_optimization", {})}
    if zero.setdefault("stage", stage) != stage:
        raise ConfigError(
            f"deepspeed.zero_optimization.stage is {zero['stage']}, but engine is {config.engine!r}: remove one of "
            "them."
        )
    settings = {"zero_allow_untested_optimizer": True, "steps_per_print": None, **settings_given, **batch}
    precisions = ("bf16", "fp16", "torch_autocast")
    if config.precision == "bfloat16" and not any(settings_given.get(key, {}).get("enabled") for key in precisions):
        settings["torch_autocast"] = {"enabled": True, "dtype": "bfloat16"}
    return {**settings, "zero_optimization": zero}


def load_deepspeed() -> Any:
    """Import DeepSpeed.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        with redirect_stdout(sys.stderr):  # DeepSpeed writes its log to standard output, which may be JSON
            import deepspeed
    except ImportError:
        raise ConfigError("engine: zero1, zero2 and zero3 need DeepSpeed: pip install deepspeed.") from None
    # An all-reduce for inference on CPUs, which takes a minute to compile in the first run on a machine.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed
