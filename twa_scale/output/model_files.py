"""The small files with which transformers loads a model: its configurations and its own code."""

import sys
from copy import deepcopy
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import nn

from twa_scale.base.notices import notice
from twa_scale.engines.module_names import own_class, unwrapped


def files_of_model(root: nn.Module) -> dict[str, bytes]:
    """Return the small files that transformers saves with a model, by path; none if the model is of another library.

    Models with adapters have none, because their files do not hold the base model.
    """
    model: Any = unwrapped(root)
    library = sys.modules.get("transformers")
    if library is None or not isinstance(model, library.PreTrainedModel) or hasattr(model, "peft_config"):
        return {}
    try:
        with TemporaryDirectory() as name:
            _save(model, Path(name))
            return files_in(Path(name))
    except Exception as error:  # The weights can be written without them.
        notice(
            f"files of this model lack config.json, because transformers cannot save it ({type(error).__name__}: "
            f"{error}). Give its content in `files`."
        )
        return {}


def files_in(directory: Path) -> dict[str, bytes]:
    """Return the contents of all files below a directory, by path."""
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def _save(model: Any, directory: Path) -> None:
    from transformers.dynamic_module_utils import custom_object_save

    kind, config = own_class(model), deepcopy(model.config)
    config.architectures, config.dtype = [kind.__name__], model.dtype
    if hasattr(model, "is_remote_code") and model.is_remote_code():
        custom_object_save(kind.__new__(kind), directory, config)  # reads the class only
    config.save_pretrained(directory)
    if model.can_generate():
        model.generation_config.save_pretrained(directory)
