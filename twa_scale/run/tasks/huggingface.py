"""Models and tokenizers from Hugging Face directories on disk. Nothing is downloaded."""

from typing import Any

import torch
from torch import nn

from twa_scale.base.inputs import named_errors
from twa_scale.base.paths import path_of
from twa_scale.errors import ConfigError
from twa_scale.run.tasks.packages import require_module


def load_config(directory: str) -> Any:
    """Return the `transformers` configuration of a model directory.

    Raises:
        ConfigError: transformers is not installed, or config.json is missing or not valid.
    """
    with named_errors(ConfigError):
        exists = (path_of(directory, ConfigError) / "config.json").is_file()
    if not exists:
        raise ConfigError(f"task.model: {directory!r} has no config.json. Give a Hugging Face model directory on disk.")
    return _from_pretrained("AutoConfig", directory, "config.json")


def load_tokenizer(directory: str) -> Any:
    """Return the tokenizer of a model directory.

    Raises:
        ConfigError: transformers is not installed, or the tokenizer is missing or not valid.
    """
    return _from_pretrained("AutoTokenizer", directory, "tokenizer files")


def load_image_processor(directory: str) -> Any:
    """Return the image processor of a model directory, in its version for PIL images.

    Raises:
        ConfigError: transformers is not installed, or the processor is missing or not valid.
    """
    return _from_pretrained("AutoImageProcessor", directory, "image processor", backend="pil")


def build_model(kind: str, config: Any, *, recompute: bool = False) -> nn.Module:
    """Return a randomly initialized float32 model of the auto class `kind`.

    Args:
        kind: the auto class, such as `AutoModelForCausalLM`.
        config: the configuration from `load_config`.
        recompute: whether blocks recompute their activations in backward (activation checkpointing).

    Raises:
        ConfigError: the architecture has no such model, or does not support recomputation.
    """
    try:
        model = getattr(_transformers(), kind).from_config(config, dtype=torch.float32, trust_remote_code=False)
    except ValueError as error:
        _refuse_code(error, config.model_type)
        raise ConfigError(f"task.model: {config.model_type!r} has no {kind}: {_first_line(error)}") from error
    if recompute:
        _recompute_activations(model, config)
    return model  # type: ignore[no-any-return]


def load_model(kind: str, config: Any, directory: str, *, recompute: bool = False) -> tuple[nn.Module, set[str]]:
    """Return a float32 model with the weights of a directory, and the names of those that are not in it, or do not fit.

    The arguments are those of `build_model`.

    Raises:
        ConfigError: the weights cannot be loaded, or the model does not support recomputation.
    """
    options = {"ignore_mismatched_sizes": True, "output_loading_info": True}
    model, info = _from_pretrained(kind, directory, "weights", config=config, dtype=torch.float32, **options)
    if recompute:
        _recompute_activations(model, config)
    return model, {*info["missing_keys"], *(name for name, *_ in info["mismatched_keys"])}


def _recompute_activations(model: Any, config: Any) -> None:
    try:
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    except ValueError as error:
        raise ConfigError(
            f"task.recompute_activations: transformers does not support it for {config.model_type!r}: "
            f"{_first_line(error)}"
        ) from error


def _from_pretrained(kind: str, directory: str, part: str, **options: Any) -> Any:
    auto = getattr(_transformers(), kind)
    path = str(path_of(directory, ConfigError))
    try:
        # Without `trust_remote_code=False`, transformers asks at a prompt whether to run code of the directory.
        return auto.from_pretrained(path, local_files_only=True, trust_remote_code=False, **options)
    except Exception as error:  # for damaged files, transformers and tokenizers raise many kinds of exceptions
        _refuse_code(error, directory)
        raise ConfigError(
            f"task.model: the {part} of {directory!r} cannot be used: {_first_line(error)} "
            "Save them there with save_pretrained."
        ) from error


def _refuse_code(error: Exception, name: str) -> None:
    """Replace the error of transformers that recommends to trust remote code."""
    if "trust_remote_code" in str(error):
        raise ConfigError(
            f"task.model: {name!r} needs Python code that comes with it (`auto_map` in its JSON files); it was not "
            "run, and no setting allows it. Use an architecture that is part of transformers, or, if you have read "
            "the code, install it as a package and build the model in a task of your own."
        ) from None


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).split("\n")[0]


def _transformers() -> Any:
    return require_module(
        "transformers", "task.model: a Hugging Face directory needs the package transformers", "transformers"
    )
