"""The form in which snapshots of a model are stored: that of the library which loads it."""

import torch

from twa_scale.base.notices import notice
from twa_scale.candidates.traced import Traced
from twa_scale.candidates.transformers_rules import transformers_rules
from twa_scale.engines import Engine
from twa_scale.engines.complex_weights import complex_in_model
from twa_scale.engines.module_names import named_modules
from twa_scale.output.stored_form import StoredForm, Tensor, form_of_model


def snapshot_form(engine: Engine, dtype: torch.dtype | None) -> StoredForm:
    """Return what a snapshot of a model holds: what transformers saves of its models, and the tensors of others.

    Args:
        engine: the model.
        dtype: of floating point tensors in the files; the model's own when not given.
    """
    pairs = complex_in_model(engine)
    held = {info.name: (info.shape, info.dtype) for info in engine.parameters.values()}
    held |= {name: (tuple(buffer.shape), buffer.dtype) for name, buffer in engine.buffers().items()}
    tensors = {name: Tensor(shape, own, name in pairs) for name, (shape, own) in held.items()}
    live = {name: Traced.stored(name, shape, own) for name, (shape, own) in held.items()}
    rules = transformers_rules(named_modules(engine.module), {name: shape for name, (shape, _) in held.items()})
    if rules is None or rules.prefix:  # nothing loads a part of a model from its files
        return form_of_model(tensors, live, dtype)
    try:
        return form_of_model(tensors, rules.saved(live), dtype)
    except Exception as error:  # of any kind, from code of another library
        if engine.shard_group.rank == 0:
            notice(
                "the form in which transformers saves this model is not written, but its tensors as they are, which "
                f"from_pretrained reads: {type(error).__name__}: {error}."
            )
        return form_of_model(tensors, live, dtype)
