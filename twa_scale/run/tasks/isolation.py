"""Attention inside single documents of a window: `isolate_documents` of the task `causal_lm`.

Models of transformers mask attention between sequences when the positions of tokens start again at 0 and there is no
attention mask. Models with recurrent layers, or without positions, do not, so a forward pass of the model is checked.
"""

import inspect

import torch
from torch import nn

from twa_scale.errors import ConfigError

_HALF = 4  # tokens of each of the two documents of the check
_TOLERANCES = {torch.float32: 1e-5, torch.float64: 1e-9}
_LOW_PRECISION = 1e-2
"""The tolerance relative to the largest logit. The same kernels compute all rows, so isolated ones are nearly equal."""
_KEY = "task.isolate_documents"
_FIX = "Leave it out, or use `documents: padded`, where each example is from one document."


def require_positions(model: nn.Module) -> None:
    """Check that a model takes the positions of tokens.

    Raises:
        ConfigError: its forward pass has no `position_ids`.
    """
    if "position_ids" not in inspect.signature(model.forward).parameters:
        raise ConfigError(
            f"{_KEY}: {type(model).__name__} takes no `position_ids`, which tell models of transformers where "
            f"documents begin. {_FIX}"
        )


@torch.no_grad()
def require_isolation(model: nn.Module, vocabulary: int, device: torch.device) -> None:
    """Check that no token attends to the preceding document, with one forward pass of 2 x 8 tokens.

    Two rows have different first documents and the same second one, whose logits must be equal. Collective for
    sharded models.

    Args:
        model: the model in any wrapper; it takes `input_ids` and `position_ids`.
        vocabulary: the size of the vocabulary.
        device: the device of the tokens.

    Raises:
        ConfigError: the logits differ.
    """
    first = torch.arange(2 * _HALF).view(2, _HALF)
    second = torch.arange(_HALF).expand(2, _HALF) + 1
    tokens = (torch.cat([first, second], 1) % vocabulary).to(device)
    positions = torch.arange(_HALF).repeat(2).expand(2, -1).to(device)
    training = [module for module in model.modules() if module.training]
    model.eval()  # dropout would differ between rows
    try:
        logits = model(input_ids=tokens, position_ids=positions, use_cache=False).logits[:, _HALF:]
    finally:
        for module in training:
            module.training = True
    first_logits, second_logits = logits.float()
    tolerance = _TOLERANCES.get(logits.dtype, _LOW_PRECISION)
    if torch.is_autocast_enabled(device.type):
        tolerance = _LOW_PRECISION
    if float((first_logits - second_logits).abs().max()) > tolerance * float(first_logits.abs().max()):
        raise ConfigError(
            f"{_KEY}: {type(model).__name__} lets tokens attend to the preceding document, although positions start "
            "again at each document: it has recurrent layers, for example, or an attention that needs a mask. "
            f"{_FIX}"
        )
