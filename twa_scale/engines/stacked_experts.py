"""Find the tensors in which a model stacks its experts: (experts, ..), as the models of transformers 5 do."""

from collections.abc import Mapping
from typing import NamedTuple

from torch import nn

from twa_scale.base.names import experts_path, is_router
from twa_scale.engines.engine import ParameterInfo
from twa_scale.engines.module_names import named_modules

_COUNTS = ("num_experts", "moe_num_experts", "num_local_experts", "n_routed_experts")


class StackedExperts(NamedTuple):
    """A tensor whose equal parts along the first dimension belong to experts."""

    path: str
    """The path of the experts, "layers.0.mlp.experts": the same for all tensors of these experts."""
    number: int
    """The number of experts."""


def stacked_experts(module: nn.Module, parameters: Mapping[str, ParameterInfo]) -> dict[str, StackedExperts]:
    """Return the tensors that stack experts, by name.

    A module stacks experts if it holds a tensor of three or more dimensions, whose first size is the number of experts
    that the module has as an attribute (`num_experts`), or that is inside `experts` in the path of the module. Other
    tensors of the module with the same first size, such as biases, are also stacked, except routers. A matrix inside
    `experts` may hold the rows of all experts one after the other, as in DBRX. Shared experts are not stacked.

    Args:
        module: the model, or its wrapper.
        parameters: the parameters of the model.
    """
    modules = dict(named_modules(module))
    of_owner: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, info in parameters.items():
        of_owner.setdefault(name.rpartition(".")[0], {})[name] = info.shape
    result: dict[str, StackedExperts] = {}
    for owner, shapes in of_owner.items():
        holder = modules.get(owner)
        if holder is None or type(holder).__module__.startswith("torch.nn"):
            continue  # a convolution inside of an expert has three dimensions too
        result |= _stacked_in(owner, shapes, _declared(holder))
    return result


def _stacked_in(owner: str, shapes: Mapping[str, tuple[int, ...]], declared: int | None) -> dict[str, StackedExperts]:
    path, number = experts_path(owner)
    if number is not None or "shared" in owner.rpartition(".")[2] or (path is None and declared is None):
        return {}
    deep = [shape[0] for shape in shapes.values() if len(shape) > 2 and declared in (None, shape[0])]
    if deep:
        count = deep[0]
        stacked = [
            name
            for name, shape in shapes.items()
            if shape and shape[0] == count and not (len(shape) < 3 and is_router(name.rpartition(".")[2]))
        ]
    elif path is not None and declared:
        count = declared
        stacked = [name for name, shape in shapes.items() if len(shape) == 2 and _holds_rows_of(count, shape[0])]
    else:
        return {}
    # Without `experts` in the path, the parent joins modules of one layer: `mlp.input_linear` and `mlp.output_linear`.
    parent = owner.rpartition(".")[0]
    path = path or (f"{parent}.experts" if parent else "experts")
    return {name: StackedExperts(path, count) for name in stacked} if count else {}


def _holds_rows_of(count: int, rows: int) -> bool:
    return rows > count and rows % count == 0


def _declared(holder: nn.Module) -> int | None:
    """Return the number of experts that a module has as an attribute."""
    counts = (getattr(holder, name, None) for name in _COUNTS)
    return next((count for count in counts if type(count) is int and count > 0), None)
