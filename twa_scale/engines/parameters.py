"""Functions that engines share: names, locations and memory of the parameters and buffers of a module."""

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from itertools import chain, pairwise
from typing import TypeVar

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from twa_scale.engines.engine import ParameterInfo
from twa_scale.engines.module_names import name_unwrapper
from twa_scale.errors import EngineError

T = TypeVar("T")

ALREADY_ATTACHED = "another average is attached to this model and has taken its gradients; call close() on it first."
GRADIENT_TAKEN = (
    "another average is attached to this model and has taken its gradients (call close() on it first), or a hook of "
    "the model frees gradients, as an optimizer in backward does (remove it)."
)
_MARK = "_averaged_by_twa_scale"


def mark_attached(model: nn.Module) -> None:
    """Mark a model as attached, so that a second average, which would find no gradients, is refused.

    Raises:
        EngineError: the model is already marked.
    """
    if getattr(model, _MARK, False):
        raise EngineError(ALREADY_ATTACHED)
    setattr(model, _MARK, True)


def unmark_attached(model: nn.Module) -> None:
    """Remove the mark of `mark_attached`."""
    setattr(model, _MARK, False)


def require_usable(module: nn.Module) -> None:
    """Check that parameters and persistent buffers have shapes, and can be written.

    Raises:
        EngineError: names the first tensor that is uninitialized, or was created in `torch.inference_mode`.
    """
    for name, tensor in chain(module.named_parameters(), persistent_buffers(module).items()):
        if is_lazy(tensor):
            raise EngineError(
                f"{name!r} is uninitialized, like the parameters of lazy modules such as LazyLinear: it has no shape "
                "yet. Run one forward pass before attach."
            )
        if tensor.is_inference():
            raise EngineError(
                f"{name!r} was created in torch.inference_mode(), so torch does not allow changes outside of it. "
                "Create the model outside, or under torch.no_grad()."
            )


def require_separate(parameters: Mapping[str, torch.Tensor]) -> None:
    """Check that parameters do not share memory. Parameters that are not contiguous are refused elsewhere.

    Raises:
        EngineError: names two parameters that share memory, so that a write to one changes the other.
    """
    storages: dict[tuple[torch.device, int], list[tuple[int, int, str]]] = defaultdict(list)
    for name, tensor in parameters.items():
        if tensor.numel() and tensor.is_contiguous() and not tensor.is_meta:
            last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
            start = tensor.data_ptr()
            ranges = storages[tensor.device, tensor.untyped_storage().data_ptr()]
            ranges.append((start, start + (last + 1) * tensor.itemsize, name))
    for ranges in storages.values():
        ranges.sort()
        for (_, end, first), (start, _, second) in pairwise(ranges):
            if start < end:
                raise EngineError(
                    f"parameters {first!r} and {second!r} share memory, but are two parameters, so each would "
                    "overwrite the other. Tie them by one nn.Parameter that both modules hold, or clone one of them."
                )


def by_first_name(root: nn.Module, named: Iterable[tuple[str, T]]) -> dict[str, tuple[T, tuple[str, ...]]]:
    """Return each object by its first name without the prefixes of wrappers, together with all of its names.

    Args:
        root: the module that the names refer to.
        named: (name, object) pairs; an object that is shared occurs several times.

    Raises:
        EngineError: two different objects have the same name without the prefixes of wrappers.
    """
    unwrap = name_unwrapper(root)
    first: dict[str, T] = {}
    names: dict[int, list[str]] = {}
    for raw_name, item in named:
        name = unwrap(raw_name)
        known = names.setdefault(id(item), [])
        if name in known:  # a module reached twice, for example below an activation-checkpoint wrapper
            continue
        known.append(name)
        if len(known) == 1:
            if name in first:
                raise EngineError(f"two parameters of the model are both called {name!r}; rename one of them.")
            first[name] = item
    return {name: (item, tuple(names[id(item)])) for name, item in first.items()}


def named_parameters(module: nn.Module) -> tuple[dict[str, nn.Parameter], dict[str, ParameterInfo]]:
    """Return the parameters of `module` and their metadata by name without the prefixes of wrappers, tied ones once.

    Raises:
        EngineError: two different parameters have the same name without the prefixes of wrappers.
    """
    parameters = by_first_name(module, module.named_parameters(remove_duplicate=False))
    infos = {
        name: ParameterInfo(name, tuple(p.shape), p.dtype, p.requires_grad, aliases)
        for name, (p, aliases) in parameters.items()
    }
    return {name: p for name, (p, _) in parameters.items()}, infos


ParameterLocations = list[tuple[str, nn.Module, str, nn.Parameter]]
"""For each parameter: its full name, the module that holds it, its name in that module, and the parameter."""


def parameter_locations(module: nn.Module) -> ParameterLocations:
    """Return the locations of all parameters in `module`; a tied parameter has several."""
    return [
        (f"{prefix}.{key}" if prefix else key, child, key, parameter)
        for prefix, child in module.named_modules()
        for key, parameter in child._parameters.items()
        if parameter is not None
    ]


def require_same_parameters(
    parameter_locations: ParameterLocations, gathered: Callable[[], Collection[int]] = tuple
) -> None:
    """Check that the model still holds the parameters that it had at attach.

    Args:
        parameter_locations: the locations of the parameters at attach.
        gathered: returns the ids of parameters with which the sharding library temporarily replaces them.

    Raises:
        EngineError: names the first parameter that was replaced.
    """
    others = [
        (name, id(replacement))
        for name, child, key, parameter in parameter_locations
        if (replacement := child._parameters.get(key)) is not parameter
    ]
    known = gathered() if others else ()
    for name, identity in others:
        if identity not in known:
            raise was_replaced(name)


def was_replaced(name: str) -> EngineError:
    """Return the error for a parameter whose memory the model no longer uses."""
    return EngineError(
        f"parameter {name!r} was replaced since attach (load_state_dict(assign=True), .to(dtype), or another module, "
        "perhaps), so the average would write to memory that the model no longer uses. Change the model before "
        "attach, or attach again."
    )


def require_shape(name: str, tensor: torch.Tensor, shape: Sequence[int]) -> None:
    """Check that a parameter has the shape that it had at attach. Kernels would write outside of smaller memory.

    Raises:
        EngineError: `.data` was replaced by memory of another shape.
    """
    if tensor.shape != shape:
        raise was_replaced(name)


def memory_version(tensor: torch.Tensor) -> tuple[int, int]:
    """Return the address of a tensor's memory and its version: the number of in-place writes by torch."""
    return tensor.data_ptr(), number_of_writes(tensor)


def number_of_writes(tensor: torch.Tensor) -> int:
    """Return the version of a tensor."""
    try:
        return tensor._version
    except RuntimeError:  # an inference tensor has no version; `is_inference()` on each tensor would cost 50 % more
        return 0


def persistent_buffers(module: nn.Module) -> dict[str, torch.Tensor]:
    """Return the persistent buffers of `module` by name without the prefixes of wrappers."""
    unwrap, buffers = name_unwrapper(module), {}
    for prefix, child in module.named_modules():
        for key, buffer in child._buffers.items():
            if buffer is not None and key not in child._non_persistent_buffers_set:
                buffers[unwrap(f"{prefix}.{key}" if prefix else key)] = buffer
    return buffers


def flat_gradient(gradient: torch.Tensor) -> torch.Tensor:
    """Return a gradient as a dense 1-D tensor. Gradients of `nn.Embedding(sparse=True)` are sparse."""
    return (gradient if gradient.layout == torch.strided else gradient.to_dense()).reshape(-1)


def flat_view(name: str, tensor: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """Return a 1-D view of a parameter's memory.

    Args:
        name: the name of the parameter, for messages.
        tensor: the parameter.
        shape: its shape at attach.

    Raises:
        EngineError: the parameter has another shape, or its memory is not row-major, so that there is no such view.
    """
    require_shape(name, tensor, shape)
    if not tensor.is_contiguous():
        raise EngineError(
            f"parameter {name!r} is not contiguous in memory (channels_last, perhaps), so its spans cannot be written "
            "in place. Call .contiguous() on it before attach."
        )
    return tensor.detach().view(-1)
