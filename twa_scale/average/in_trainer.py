"""How transformers' Trainer, whose optimizer is that of an average, saves its state. It is not imported here."""

import sys
from typing import Any

import torch

from twa_scale.base.calls import running_calls


def _trainer_of(optimizer: torch.optim.Optimizer) -> Any:
    """Return the Trainer that is training with an optimizer, or None."""
    kind = getattr(sys.modules.get("transformers.trainer"), "Trainer", None)
    if kind is None:
        return None
    for call in running_calls():
        # Reading the variables of a call keeps them alive until it ends; `train` has no batch.
        if call.f_code.co_name == "train" and isinstance(trainer := call.f_locals.get("self"), kind):
            inside = trainer.optimizer
            while inside is not None and inside is not optimizer:
                inside = getattr(inside, "optimizer", None)  # of a wrapper
            if inside is not None:
                return trainer
    return None


def saved_by_callback(optimizer: torch.optim.Optimizer) -> bool | None:
    """Return whether a callback of the Trainer that is training saves the average of this optimizer: it has `saves`.

    Only the callbacks that the Trainer has now count. One may be added late, or be removed. Outside of a Trainer it is
    None.
    """
    trainer = _trainer_of(optimizer)
    if trainer is None:
        return None
    return any(getattr(callback, "saves", None) is optimizer for callback in trainer.callback_handler.callbacks)
