"""The private API of transformers that is used for checkpoints. It is checked before it is used."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from twa_scale.errors import CandidateError

LIBRARY = "transformers"
_TESTED = "5.0 and 5.23"
_FUNCTIONS = {
    "get_model_conversion_mapping": "conversion_mapping",
    "dot_natural_key": "core_model_loading",
    "rename_source_key": "core_model_loading",
    "revert_weight_conversion": "core_model_loading",  # reads `_weight_conversions` of models
    "WeightConverter": "core_model_loading",
}
_CONVERTER_ATTRIBUTES = ("add_tensor", "collected_tensors", "convert", "layer_targets", "operations", "source_patterns")
_MODEL_ATTRIBUTES = ("base_model_prefix", "config")  # and `_keys_to_ignore_on_load_unexpected`, if a class has it


@dataclass(frozen=True)
class TransformersApi:
    """The functions and the class of transformers that rename and convert stored tensors."""

    get_model_conversion_mapping: Callable[..., list[Any]]
    dot_natural_key: Callable[[str], Any]
    rename_source_key: Callable[..., tuple[str, str | None]]
    revert_weight_conversion: Callable[..., dict[str, Any]]
    WeightConverter: Any


def has_rules() -> bool:
    """Return whether the installed transformers converts checkpoints. Before version 5 it only loads them."""
    return all(find_spec(f"{LIBRARY}.{module}") is not None for module in dict.fromkeys(_FUNCTIONS.values()))


def transformers_api(model: object) -> TransformersApi:
    """Return the functions that rules need, after a check of the version.

    Args:
        model: a model of a class of transformers.

    Raises:
        CandidateError: the installed version lacks a function. The message names it and the tested versions.
    """
    functions = {}
    for name, module in _FUNCTIONS.items():
        home = import_module(f"{LIBRARY}.{module}")
        _require(home, f"{LIBRARY}.{module}", name)
        functions[name] = getattr(home, name)
    for name in _CONVERTER_ATTRIBUTES:
        _require(functions["WeightConverter"], "WeightConverter", name)
    for name in _MODEL_ATTRIBUTES:
        _require(model, "the model", name)
    return TransformersApi(**functions)


def version() -> str:
    """Return the version of transformers."""
    return str(getattr(import_module(LIBRARY), "__version__", "of unknown version"))


def _require(owner: object, location: str, name: str) -> None:
    """Check that an attribute exists. Attributes of instances are found if the class annotates them."""
    annotated = {key for kind in getattr(owner, "__mro__", ()) for key in vars(kind).get("__annotations__", ())}
    if not hasattr(owner, name) and name not in annotated:
        raise CandidateError(
            f"{location} of {LIBRARY} {version()} has no {name!r}, which this version of twa_scale needs to read and "
            f"write files of its models; use {LIBRARY} {_TESTED}, or state dicts with the names of the model."
        )
