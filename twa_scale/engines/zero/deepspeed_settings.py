"""Checks of DeepSpeed settings that an average does not support. Each error names the setting and the fix."""

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
    "_is_gradient_accumulation_boundary",
    "micro_steps",
    "global_steps",
    "global_samples",
    "train_batch_size",
)
_CONFIG = ("_param_dict", "zero_config")


def stateless_optimizer(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """Return an optimizer without state for `deepspeed.initialize`. It never steps, because `twa.step` replaces it.

    DeepSpeed requires `"zero_allow_untested_optimizer": true` with it.
    """
    return torch.optim.SGD(parameters, lr=0.0)


def settings_of(engine: Any) -> dict[str, Any]:
    """Return the configuration with which the engine was created."""
    return dict(engine._config._param_dict)


def check_supported(engine: Any) -> None:
    """Check that the engine partitions weights as ZeRO-1, 2 or 3 does.

    Raises:
        EngineError: names the unsupported setting and an alternative.
    """
    if type(engine).__name__ == "PipelineEngine":
        raise EngineError("DeepSpeed pipeline parallelism is not supported: use ZeRO, which needs no stages.")
    require("deepspeed", engine, _ENGINE)
    require("deepspeed", engine._config, _CONFIG)
    if engine.has_moe_layers:
        raise EngineError(
            "DeepSpeed mixture-of-experts layers are not supported: experts have their own process groups."
        )
    for degree, name in ((engine.mp_world_size, "tensor"), (engine.sequence_parallel_size, "sequence")):
        if degree > 1:
            raise EngineError(f"DeepSpeed {name} parallelism (size {degree}) is not supported: use ZeRO alone.")
    stage = int(engine.zero_optimization_stage())
    if stage == 0:
        raise EngineError(
            'zero_optimization.stage is 0; use "stage": 1, which costs no more, or DistributedDataParallel.'
        )
    zero = engine._config.zero_config
    if zero.zero_hpz_partition_size > 1:
        raise EngineError(
            "zero_hpz_partition_size (hpZ) keeps second copies of the weights, which is not supported; set it to 1."
        )
    for key in ("zero_quantized_weights", "zero_quantized_nontrainable_weights", "zero_quantized_gradients"):
        if getattr(zero, key):
            raise EngineError(
                f"{key} (ZeRO++) is not supported: the model would not use the weights that the average wrote."
            )
    for key in ("offload_optimizer", "offload_param"):
        if "nvme" in str(getattr(getattr(zero, key), "device", "")):
            raise EngineError(f"{key} to NVMe is not supported: remove the block.")
    if engine.is_deepcompile_enabled():
        raise EngineError("DeepCompile is not supported: remove `compile.deepcompile`; torch.compile is supported.")
    wrapper = type(engine.optimizer).__name__
    if wrapper == "BF16_Optimizer":
        raise EngineError(
            'ZeRO-1 with bf16 and "grad_accum_dtype": "fp32" (BF16_Optimizer) is not supported: use "stage": 2, '
            "or remove grad_accum_dtype."
        )
    if wrapper != _WRAPPERS.get(stage):
        raise EngineError(
            f"the engine's optimizer is a {wrapper}, not a {_WRAPPERS.get(stage)}: give deepspeed.initialize "
            "optimizer=twa_scale.stateless_optimizer(model.parameters()) and plain ZeRO settings."
        )


def check_trainable(engine: Any, *, with_state: bool = False) -> None:
    """Check that no setting changes the gradient or acts in `engine.step`, which an average replaces.

    Args:
        engine: the DeepSpeedEngine.
        with_state: whether its optimizer may hold state, because training continues afterwards.

    Raises:
        EngineError: names the setting and the fix.
    """
    if engine.gradient_predivide_factor() != 1.0 or not engine.postscale_gradients():
        raise EngineError("gradient_predivide_factor and prescale_gradients change the gradient: remove them.")
    if not engine.managed_gradient_accumulation():
        raise EngineError(
            "managed_gradient_accumulation is false: twa.step() needs it to find the last micro-batch; set it to true."
        )
    zero = engine._config.zero_config
    for key in ("offload_optimizer", "offload_param"):
        device = str(getattr(getattr(zero, key), "device", "none"))
        if not device.endswith("none"):
            raise EngineError(
                f"{key} is set: there is no optimizer state to offload, and gradients must be on the device of the "
                "weights. Remove the block."
            )
    if getattr(engine.optimizer, "torch_autocast_gradscaler", None) is not None:
        raise EngineError('torch_autocast with float16 is not supported: use "bfloat16", or the "fp16" block.')
    if not with_state:
        _check_stateless(engine)


def warn_of_clipping(engine: Any) -> None:
    """Report that `gradient_clipping` has no effect, if the user has set it. DeepSpeed's own default is 1.0."""
    clipping = settings_of(engine).get("gradient_clipping", 0)
    if clipping:
        notice(
            f"gradient_clipping {clipping} has no effect: DeepSpeed clips in engine.step(), which twa.step() replaces. "
            "Set `max_weight_grad_norm` of the average instead, or `max_grad_norm` for its coefficients."
        )


def _check_stateless(engine: Any) -> None:
    stateful = [
        (key, value)
        for state in engine.optimizer.optimizer.state.values()
        for key, value in state.items()
        if torch.is_tensor(value) and value.numel() > 1
    ]
    if stateful:
        elements = sum(value.numel() for _, value in stateful)
        raise EngineError(
            f"the engine's {type(engine.optimizer.optimizer).__name__} holds {elements} elements of state "
            f"({stateful[0][0]!r}, ...) on this rank, which training an average never uses: give deepspeed.initialize "
            "optimizer=twa_scale.stateless_optimizer(model.parameters()), with "
            '"zero_allow_untested_optimizer": true and without an "optimizer" block.'
        )
