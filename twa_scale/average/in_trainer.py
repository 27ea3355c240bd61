"""Finds out whether a Trainer of transformers saves the state of an average. The package is not imported."""

import sys
from typing import Any

import torch

from twa_scale.base.calls import running_calls


def _trainer_of(optimizer: torch.optim.Optimizer) -> Any:
    """Return the Trainer that currently trains with an optimizer, or None."""
    kind = getattr(sys.modules.get("transformers.trainer"), "Trainer", None)
    if kind is None:
        return None
    for call in running_calls():
        # Reading the variables of a frame keeps them alive until the call ends. Those of `train` include no batch.
        if call.f_code.co_name == "train" and isinstance(trainer := call.f_locals.get("self"), kind):
            wrapped = trainer.optimizer
            while wrapped is not None and wrapped is not optimizer:
                wrapped = getattr(wrapped, "optimizer", None)  # the optimizer inside a wrapper
            if wrapped is not None:
                return trainer
    return None


def saved_by_callback(optimizer: torch.optim.Optimizer) -> bool | None:
    """Return whether the current Trainer has a callback that saves the average of this optimizer, or None without one.

    Such a callback has the optimizer as its attribute `saves`. Callbacks may be added or removed during training, so
    the result may change.
    """
    trainer = _trainer_of(optimizer)
    if trainer is None:
        return None
    return any(getattr(callback, "saves", None) is optimizer for callback in trainer.callback_handler.callbacks)
