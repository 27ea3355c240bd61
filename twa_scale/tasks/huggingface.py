"""Models and tokenizers of Hugging Face directories on disk, with nothing downloaded."""

from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import nn

from twa_scale.errors import ConfigError


def load_config(directory: str) -> Any:
    """Return the `transformers` configuration of a model directory.

    Raises:
        ConfigError: transformers is not installed, or there is no usable config.json.
    """
    if not Path(directory).expanduser().joinpath("config.json").is_file():
        raise ConfigError(f"task.model: {directory!r} has no config.json. Give a Hugging Face model directory on disk.")
    return _from_pretrained("AutoConfig", directory, "config.json")


def load_tokenizer(directory: str) -> Any:
    """Return the tokenizer that lies in a model directory.

    Raises:
        ConfigError: transformers is not installed, or the directory holds no usable tokenizer.
    """
    return _from_pretrained("AutoTokenizer", directory, "tokenizer files")


def build_model(kind: str, config: Any, *, recompute: bool = False) -> nn.Module:
    """Return a float32 model of auto class `kind`; its values are random.

    Args:
        kind: such as `AutoModelForCausalLM`.
        config: of `load_config`.
        recompute: whether training keeps only the input of each block for backward.

    Raises:
        ConfigError: an architecture that has no such model, or cannot recompute.
    """
    try:
        model = getattr(_transformers(), kind).from_config(config, dtype=torch.float32)
    except ValueError as error:
        raise ConfigError(f"task.model: {config.model_type!r} has no {kind}: {_first_line(error)}") from error
    if recompute:
        try:
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable({"use_reentrant": False})
        except ValueError as error:
            raise ConfigError(
                f"task.recompute_activations: transformers cannot do it for {config.model_type!r}: {_first_line(error)}"
            ) from error
    return model  # type: ignore[no-any-return]


def _from_pretrained(kind: str, directory: str, what: str) -> Any:
    auto = getattr(_transformers(), kind)
    try:
        return auto.from_pretrained(str(Path(directory).expanduser()), local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"task.model: the {what} of {directory!r} cannot be used: {_first_line(error)} "
            "Save them there with save_pretrained."
        ) from error


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]


def _transformers() -> Any:
    try:
        return import_module("transformers")
    except ImportError as error:
        raise ConfigError(
            "task.model: a Hugging Face directory needs the package transformers, which cannot be imported "
            f"({error}). Install it: pip install transformers."
        ) from error
