"""What DeepSpeed settings an average can live with; each refusal names the setting and the fix."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from twa_scale.base.notices import notice
from twa_scale.engines.private_attributes import require
from twa_scale.errors import EngineError

_WRAPPERS = {1: "DeepSpeedZeroOptimizer", 2: "DeepSpeedZeroOptimizer", 3: "DeepSpeedZeroOptimizer_Stage3"}

_ENGINE = (
    "_config",
    "optimizer",
    "device",
    "fp16_enabled",
    "zero_optimization_stage",
    "has_moe_layers",
    "mp_world_size",
    "sequence_parallel_size",
    "is_deepcompile_enabled",
    "gradient_predivide_factor",
    "postscale_gradients",
    "managed_gradient_accumulation",
    "gradient_accumulation_steps",
    "is_gradient_accumulation_boundary",
    "micro_steps",
    "global_steps",
    "global_samples",
    "train_batch_size",
)
_CONFIG = ("_param_dict", "zero_config")


def stateless_optimizer(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """Return the optimizer to give `deepspeed.initialize` when an average is trained: it never steps and holds nothing.

    DeepSpeed wants `"zero_allow_untested_optimizer": true` with it.
    """
    return torch.optim.SGD(parameters, lr=0.0)


def settings_of(engine: Any) -> dict[str, Any]:
    """Return the JSON that the engine was made with."""
    return dict(engine._config._param_dict)


def check_supported(engine: Any) -> None:
    """Refuse an engine whose weights are not where ZeRO-1, 2 and 3 keep them.

    Raises:
        EngineError: with what would do instead.
    """
    if type(engine).__name__ == "PipelineEngine":
        raise EngineError("DeepSpeed pipeline parallelism is not supported: use ZeRO, which needs no stages.")
    require("deepspeed", engine, _ENGINE)
    require("deepspeed", engine._config, _CONFIG)
    if engine.has_moe_layers:
        raise EngineError("DeepSpeed mixture-of-experts layers are not supported: experts have groups of their own.")
    for degree, name in ((engine.mp_world_size, "tensor"), (engine.sequence_parallel_size, "sequence")):
        if degree > 1:
            raise EngineError(f"DeepSpeed {name} parallelism (size {degree}) is not supported: use ZeRO alone.")
    stage = int(engine.zero_optimization_stage())
    if stage == 0:
        raise EngineError(
            'zero_optimization.stage is 0: take "stage": 1, which costs nothing more, or DistributedDataParallel.'
        )
    zero = engine._config.zero_config
    if zero.zero_hpz_partition_size > 1:
        raise EngineError(
            "zero_hpz_partition_size (hpZ) keeps second copies of the weights, not supported: set it to 1."
        )
    for key in ("zero_quantized_weights", "zero_quantized_nontrainable_weights", "zero_quantized_gradients"):
        if getattr(zero, key):
            raise EngineError(f"{key} (ZeRO++) is not supported: weights would not be those that the average wrote.")
    for key in ("offload_optimizer", "offload_param"):
        if "nvme" in str(getattr(getattr(zero, key), "device", "")):
            raise EngineError(f"{key} to NVMe is not supported: take the block out.")
    if engine.is_deepcompile_enabled():
        raise EngineError("DeepCompile is not supported: leave `compile.deepcompile` out; torch.compile may stay.")
    wrapper = type(engine.optimizer).__name__
    if wrapper == "BF16_Optimizer":
        raise EngineError(
            'ZeRO-1 with bf16 and "grad_accum_dtype": "fp32" (BF16_Optimizer) is not supported: take "stage": 2, '
            "or leave grad_accum_dtype out."
        )
    if wrapper != _WRAPPERS.get(stage):
        raise EngineError(
            f"the engine's optimizer is a {wrapper}, not a {_WRAPPERS.get(stage)}: give deepspeed.initialize "
            "optimizer=twa_scale.stateless_optimizer(model.parameters()) and plain ZeRO settings."
        )


def check_trainable(engine: Any, *, with_state: bool = False) -> None:
    """Refuse settings that act in `engine.step`, which an average replaces, or that would change the gradient.

    Args:
        engine: of DeepSpeed.
        with_state: whether its optimizer may hold state, for training that goes on afterwards.

    Raises:
        EngineError: with what would do instead.
    """
    if engine.gradient_predivide_factor() != 1.0 or not engine.postscale_gradients():
        raise EngineError("gradient_predivide_factor and prescale_gradients change the gradient: leave them out.")
    if not engine.managed_gradient_accumulation():
        raise EngineError(
            "managed_gradient_accumulation must stay true: twa.step() is told by it which micro-batch ends."
        )
    zero = engine._config.zero_config
    for key in ("offload_optimizer", "offload_param"):
        device = str(getattr(getattr(zero, key), "device", "none"))
        if not device.endswith("none"):
            raise EngineError(
                f"{key} is set: there is no optimizer state to offload, and gradients must stay where the weights are. "
                "Take the block out."
            )
    if getattr(engine.optimizer, "torch_autocast_gradscaler", None) is not None:
        raise EngineError('torch_autocast with float16 is not supported: take "bfloat16", or the "fp16" block.')
    if not with_state:
        _check_stateless(engine)


def warn_of_clipping(engine: Any) -> None:
    """Say that clipping is not done, where it was asked for: DeepSpeed's own default is 1.0."""
    asked = settings_of(engine).get("gradient_clipping", 0)
    if asked:
        notice(
            f"gradient_clipping {asked} has no effect: DeepSpeed clips in engine.step(), which twa.step() replaces. "
            "Set `max_weight_grad_norm` of the average instead, or `max_grad_norm` for its coefficients."
        )


def _check_stateless(engine: Any) -> None:
    held = [
        (key, value)
        for state in engine.optimizer.optimizer.state.values()
        for key, value in state.items()
        if torch.is_tensor(value) and value.numel() > 1
    ]
    if held:
        elements = sum(value.numel() for _, value in held)
        raise EngineError(
            f"the engine's {type(engine.optimizer.optimizer).__name__} holds {elements} elements of state "
            f"({held[0][0]!r}, ..) on this rank, which training an average never uses: give deepspeed.initialize "
            "optimizer=twa_scale.stateless_optimizer(model.parameters()), with "
            '"zero_allow_untested_optimizer": true and without an "optimizer" block.'
        )
