"""A Hugging Face model with an adapter of PEFT, for candidates that are adapters."""

from typing import Any

import torch
from pydantic import Field
from torch import nn

from twa_scale.base.inputs import named_errors
from twa_scale.base.names import quoted
from twa_scale.base.paths import path_of
from twa_scale.candidates.adapters import ADAPTER_BASE, ADAPTER_CONFIG
from twa_scale.config import Section
from twa_scale.errors import ConfigError
from twa_scale.run.tasks import huggingface
from twa_scale.run.tasks.packages import require_module


class Adapted(Section):
    """The option of tasks whose model can have an adapter."""

    adapter: str | None = Field(
        None,
        description="Directory of an adapter of PEFT that the model gets, for candidates that are adapters: one of "
        "them, or with `space: product` the output of `twa-scale average --space product`. The base model has the "
        "weights of `model`.",
    )


def checked(adapter: str | None) -> str | None:
    """Return the directory of an adapter after a check that it holds one, because PEFT would search the hub for it.

    Raises:
        ConfigError: the configuration or the weights are not there, or PEFT is not installed.
    """
    if adapter is None:
        return None
    weights = [f"{ADAPTER_BASE}.safetensors", f"{ADAPTER_BASE}.bin"]
    with named_errors(ConfigError):
        directory = path_of(adapter, ConfigError)
        has_config = (directory / ADAPTER_CONFIG).is_file()
        has_weights = any((directory / name).is_file() for name in weights)
    if not (has_config and has_weights):
        missing = " or ".join(weights) if has_config else ADAPTER_CONFIG
        raise ConfigError(f"task.adapter: {adapter!r} has no {missing}. Give the directory of one adapter on disk.")
    _peft()
    return adapter


def build_model(kind: str, config: Any, directory: str, adapter: str | None, *, recompute: bool = False) -> nn.Module:
    """Return a Hugging Face model, randomly initialized, or its weights in `directory` with an adapter that is trained.

    Args:
        kind: the auto class, such as `AutoModelForCausalLM`.
        config: the configuration of the model.
        directory: the directory of the model.
        adapter: the directory of the adapter, from `checked`; None for a model without one.
        recompute: whether blocks recompute their activations in backward.

    Raises:
        ConfigError: as `huggingface.build_model` does; the adapter does not fit the model, or both lack a tensor.
    """
    if adapter is None:
        return huggingface.build_model(kind, config, recompute=recompute)
    peft, path, lacking = _peft(), str(path_of(adapter, ConfigError)), set[str]()
    is_empty = torch.empty(0).is_meta  # Only names and shapes are needed then.
    if is_empty:
        base = huggingface.build_model(kind, config, recompute=recompute)
    else:
        base, lacking = huggingface.load_model(kind, config, directory, recompute=recompute)
    random = {id(parameter): name for name, parameter in base.named_parameters() if name in lacking}
    try:
        if is_empty:
            settings = peft.PeftConfig.from_pretrained(path)
            settings.inference_mode = False
            model: nn.Module = peft.get_peft_model(base, settings)
        else:
            model = peft.PeftModel.from_pretrained(base, path, is_trainable=True)
    except Exception as error:  # of another library
        raise ConfigError(
            f"task.adapter: {adapter!r} does not fit {directory!r} ({type(error).__name__}: {error}). Give the base "
            "model of the adapter as task.model, with the same numbers of labels and tokens."
        ) from error
    used = [id(parameter) for name, parameter in model.named_parameters() if "original_module" not in name]
    if names := sorted(random[key] for key in used if key in random):
        raise ConfigError(
            f"task.adapter: neither {directory!r} nor {adapter!r} has {quoted(names, 2)} of {type(base).__name__}. "
            "Give the base model of the adapter as task.model, or train the adapter with these in `modules_to_save`."
        )
    return model


def _peft() -> Any:
    return require_module("peft", "task.adapter: an adapter needs the package peft", "peft")
