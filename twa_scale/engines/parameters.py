"""What engines share: naming the parameters and buffers of a module."""

from collections.abc import Iterable
from typing import TypeVar

import torch
from torch import nn

from twa_scale.engines.engine import ParameterInfo
from twa_scale.engines.module_names import unwrapping
from twa_scale.errors import EngineError

T = TypeVar("T")

TWICE = "another average is attached to this model and has taken its gradients; call close() on it first."
_TAKEN = "_averaged_by_twa_scale"


def claim(model: nn.Module) -> None:
    """Mark a model whose gradients are taken at the step, which a second average would find gone.

    Raises:
        EngineError: it is marked already.
    """
    if getattr(model, _TAKEN, False):
        raise EngineError(TWICE)
    setattr(model, _TAKEN, True)


def release(model: nn.Module) -> None:
    """Take the mark of `claim` off."""
    setattr(model, _TAKEN, False)


def by_first_name(root: nn.Module, named: Iterable[tuple[str, T]]) -> dict[str, tuple[T, tuple[str, ...]]]:
    """Return things of `root` by their first name without wrappers, each with all the names that it goes by.

    Raises:
        EngineError: two different things whose names are the same once wrappers are taken off.
    """
    unwrap = unwrapping(root)
    first: dict[str, T] = {}
    names: dict[int, list[str]] = {}
    for raw, thing in named:
        name = unwrap(raw)
        known = names.setdefault(id(thing), [])
        if name in known:  # a module reached twice, as under an activation-checkpoint wrapper
            continue
        known.append(name)
        if len(known) == 1:
            if name in first:
                raise EngineError(f"two parameters of the model are both called {name!r}; rename one of them.")
            first[name] = thing
    return {name: (thing, tuple(names[id(thing)])) for name, thing in first.items()}


def named_parameters(module: nn.Module) -> tuple[dict[str, nn.Parameter], dict[str, ParameterInfo]]:
    """Return the parameters of `module` and their descriptions, tied ones once, by name without wrappers.

    Raises:
        EngineError: two different parameters whose names are the same once wrappers are taken off.
    """
    found = by_first_name(module, module.named_parameters(remove_duplicate=False))
    infos = {
        name: ParameterInfo(name, tuple(p.shape), p.dtype, p.requires_grad, aliases)
        for name, (p, aliases) in found.items()
    }
    return {name: p for name, (p, _) in found.items()}, infos


Places = list[tuple[str, nn.Module, str, nn.Parameter]]
"""Name of a parameter, the module that holds it, its name there, and itself."""


def places(module: nn.Module) -> Places:
    """Return where the parameters of `module` are, tied ones everywhere."""
    return [
        (f"{prefix}.{key}" if prefix else key, child, key, parameter)
        for prefix, child in module.named_modules()
        for key, parameter in child._parameters.items()
        if parameter is not None
    ]


def require_in_place(places: Places) -> None:
    """Refuse a model whose parameters are no longer those that were attached to.

    Raises:
        EngineError: names the first that was replaced.
    """
    for name, child, key, parameter in places:
        if child._parameters.get(key) is not parameter:
            raise EngineError(
                f"parameter {name!r} was replaced since attach (load_state_dict(assign=True), perhaps): the average "
                "writes to memory that the model no longer uses. Change the model before attach, or attach anew."
            )


def writes(tensor: torch.Tensor) -> tuple[int, int]:
    """Return where a tensor's memory is, and how often torch has written it in place."""
    address = tensor.data_ptr()
    try:
        return address, tensor._version
    except RuntimeError:  # an inference tensor has no counter; asking each first costs half as much again
        return address, 0


def persistent_buffers(module: nn.Module) -> dict[str, torch.Tensor]:
    """Return the buffers that `module.state_dict()` holds, by name without wrappers."""
    unwrap, buffers = unwrapping(module), {}
    for prefix, child in module.named_modules():
        for key, buffer in child._buffers.items():
            if buffer is not None and key not in child._non_persistent_buffers_set:
                buffers[unwrap(f"{prefix}.{key}" if prefix else key)] = buffer
    return buffers


def flat(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Return the 1-D live view of a parameter's memory.

    Raises:
        EngineError: memory that is not row-major, which has no such view.
    """
    if not tensor.is_contiguous():
        raise EngineError(
            f"parameter {name!r} is not contiguous in memory (channels_last, perhaps): a span of it cannot be written "
            "in place. Call .contiguous() on it before attach."
        )
    return tensor.detach().view(-1)
