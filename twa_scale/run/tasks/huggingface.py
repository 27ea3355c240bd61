"""Models and tokenizers of Hugging Face directories on disk, with nothing downloaded."""

from importlib import import_module
from typing import Any

import torch
from torch import nn

from twa_scale.base.inputs import named_errors
from twa_scale.base.paths import path_of
from twa_scale.errors import ConfigError


def load_config(directory: str) -> Any:
    """Return the `transformers` configuration of a model directory.

    Raises:
        ConfigError: transformers is not installed, or there is no usable config.json.
    """
    with named_errors(ConfigError):
        there = (path_of(directory, ConfigError) / "config.json").is_file()
    if not there:
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
        model = getattr(_transformers(), kind).from_config(config, dtype=torch.float32, trust_remote_code=False)
    except ValueError as error:
        _refuse_code(error, config.model_type)
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
    path = str(path_of(directory, ConfigError))
    try:
        # Without `trust_remote_code=False` it asks at a prompt whether to run code of the directory.
        return auto.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # of damaged files, transformers and tokenizers raise almost anything
        _refuse_code(error, directory)
        raise ConfigError(
            f"task.model: the {what} of {directory!r} cannot be used: {_first_line(error)} "
            "Save them there with save_pretrained."
        ) from error


def _refuse_code(error: Exception, name: str) -> None:
    """Say in our words what transformers says with the advice to trust code that comes with weights."""
    if "trust_remote_code" in str(error):
        raise ConfigError(
            f"task.model: {name!r} needs Python code that comes with it (`auto_map` in its JSON files); nothing of it "
            "was run, and no setting allows it. Use an architecture that is part of transformers, or, if you have "
            "read that code, install it as a package and build the model in a task of your own."
        ) from None


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).split("\n")[0]


def _transformers() -> Any:
    try:
        return import_module("transformers")
    except ImportError as error:
        raise ConfigError(
            "task.model: a Hugging Face directory needs the package transformers, which cannot be imported "
            f"({error}). Install it: pip install transformers."
        ) from error
