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
    library = sys.modules.get("transformers.modeling_utils")  # imported by every model of transformers
    if library is None or not isinstance(model, library.PreTrainedModel) or hasattr(model, "peft_config"):
        return {}
    with TemporaryDirectory() as name:
        for part, save in (("config.json", _save_config), ("generation_config.json", _save_generation_config)):
            try:
                save(model, Path(name))
            except Exception as error:  # The weights can be written without it.
                notice(
                    f"files of this model lack {part}, because transformers cannot save it ({type(error).__name__}: "
                    f"{error}). Correct the configuration, or give the content of this file in `files`."
                )
        return files_in(Path(name))


def files_in(directory: Path) -> dict[str, bytes]:
    """Return the contents of all files below a directory, by path."""
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def _save_config(model: Any, directory: Path) -> None:
    from transformers.dynamic_module_utils import custom_object_save

    kind, config = own_class(model), deepcopy(model.config)
    config.architectures, config.dtype = [kind.__name__], model.dtype
    if hasattr(model, "is_remote_code") and model.is_remote_code():
        custom_object_save(kind.__new__(kind), directory, config)  # reads the class only
    config.save_pretrained(directory)


def _save_generation_config(model: Any, directory: Path) -> None:
    if model.can_generate():
        model.generation_config.save_pretrained(directory)
