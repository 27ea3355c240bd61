"""The form of a model's snapshots: the names and shapes with which its library saves and loads it."""

import torch

from twa_scale.base.notices import notice
from twa_scale.candidates.traced import Traced
from twa_scale.candidates.transformers_rules import transformers_rules
from twa_scale.engines import Engine
from twa_scale.engines.module_names import named_modules
from twa_scale.output.stored_form import StoredForm, Tensor, form_of_model


def snapshot_form(engine: Engine, dtype: torch.dtype | None) -> StoredForm:
    """Return the form of a model's snapshots: that of transformers for its models, else the tensors unchanged.

    Args:
        engine: the engine of the model.
        dtype: the type of floating point tensors in the files; None for their type in the model.
    """
    pairs = engine.complex_names
    stored = {info.name: (info.shape, info.dtype) for info in engine.parameters.values()}
    stored |= {name: (tuple(buffer.shape), buffer.dtype) for name, buffer in engine.buffers().items()}
    tensors = {name: Tensor(shape, own_dtype, name in pairs) for name, (shape, own_dtype) in stored.items()}
    live = {name: Traced.stored(name, shape, own_dtype) for name, (shape, own_dtype) in stored.items()}
    rules = transformers_rules(named_modules(engine.module), {name: shape for name, (shape, _) in stored.items()})
    if rules is None or rules.prefix:  # No loader reads a part of a model from these files.
        return form_of_model(tensors, live, dtype)
    try:
        return form_of_model(tensors, rules.saved(live), dtype)
    except Exception as error:  # The rules are code of another library.
        if engine.shard_group.rank == 0:
            notice(
                "snapshots hold the tensors under the model's own names, which from_pretrained reads, because the form "
                f"in which transformers saves this model is unknown: {type(error).__name__}: {error}."
            )
        return form_of_model(tensors, live, dtype)
