"""Marks in place of gradients that backward has projected and freed, so that later uses of them are noticed."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_leaves, tree_map

from twa_scale.base.notices import notice
from twa_scale.engines.dtensor_spans import like_parameter
from twa_scale.errors import EngineError


class ProjectedGradient(torch.Tensor):
    """A tensor of zeros without memory.

    Args:
        like: has the shape, strides, dtype and device.
        on_use: called before each operation on the tensor.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]  # results are plain tensors

    def __new__(cls, like: torch.Tensor, on_use: Callable[[], None]) -> "ProjectedGradient":
        """Make the tensor."""
        return torch.Tensor._make_wrapper_subclass(
            cls, like.shape, strides=like.stride(), dtype=like.dtype, device=like.device
        )

    def __init__(self, like: torch.Tensor, on_use: Callable[[], None]) -> None:
        super().__init__()
        self._on_use = on_use

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch's annotation lacks the defaults
        cls, operation: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call `operation` with zeros. Views of the same shape, from which DTensors are made, are no use."""
        mark = next(value for value in tree_leaves((args, kwargs)) if isinstance(value, cls))
        if operation is torch.ops.aten.view.default and tuple(args[1]) == mark.shape:
            return cls(mark, mark._on_use)
        mark._on_use()

        def as_zeros(value: Any) -> Any:
            return torch.zeros(value.shape, dtype=value.dtype, device=value.device) if isinstance(value, cls) else value

        return operation(*tree_map(as_zeros, args), **tree_map(as_zeros, kwargs or {}))

    def __iadd__(self, gradient: torch.Tensor) -> torch.Tensor:  # type: ignore[override, misc]
        """Return `gradient`: FSDP2 adds the gradients of several backward passes with this operator."""
        return gradient


class ProjectedGradients:
    """The marks in a model: `grad` of each parameter whose gradient was projected and freed is a mark until the step.

    Code that clips or scales gradients skips parameters without one. If it uses a mark, there is a warning. A mark that
    is gone before the step shows that code has discarded or replaced the gradient, which is an error.

    Args:
        warns: whether this rank issues the warning.
    """

    def __init__(self, *, warns: bool) -> None:
        self._warns = warns
        self._marks: dict[str, torch.Tensor] = {}
        self._marked: dict[str, torch.Tensor] = {}
        self._lost: str | None = None

    def add(self, name: str, parameter: torch.Tensor) -> None:
        """Replace the gradient of the parameter of this name by a mark."""
        mark = self._marks.get(name)
        if name in self._marked and parameter.grad is not mark:
            self._lost = self._lost or name
        used = parameter.grad is mark  # FSDP2 has put the next gradient into it
        if mark is None or used or (mark.dtype, mark.device) != (parameter.dtype, parameter.device):
            mark = self._marks[name] = self._mark(parameter)
        parameter.grad = mark
        self._marked[name] = parameter

    @staticmethod
    def is_mark(gradient: torch.Tensor) -> bool:
        """Return whether a gradient, or the local part of it, is a mark."""
        return isinstance(gradient.to_local() if isinstance(gradient, DTensor) else gradient, ProjectedGradient)

    def before_accumulation(self, name: str, parameter: torch.Tensor, _gradient: torch.Tensor) -> None:
        """Remove the mark of a parameter. A hook that autograd calls before it adds a gradient; FSDP2 does not."""
        if name in self._marked and parameter.grad is self._marks[name]:
            del self._marked[name]
            parameter.grad = None

    def remove(self) -> str | None:
        """Remove all marks. Return the name of a parameter whose mark was gone, or None."""
        for name, parameter in self._marked.items():
            if parameter.grad is self._marks[name]:
                parameter.grad = None
            else:
                self._lost = self._lost or name
        lost, self._lost = self._lost, None
        self._marked.clear()
        return lost

    def finish(self) -> None:
        """Remove all marks for a step.

        Raises:
            EngineError: a mark was gone.
        """
        if lost := self.remove():
            raise EngineError(
                f"the gradient of {lost!r} was discarded or replaced (model.zero_grad(), `.grad = ..`), but backward "
                "has projected it already, so it would count in this step. Call zero_grad() of the average instead."
            )

    def _mark(self, parameter: torch.Tensor) -> torch.Tensor:
        if not isinstance(parameter, DTensor):
            return ProjectedGradient(parameter, self._warn)
        with torch.no_grad():
            return like_parameter(parameter, ProjectedGradient(parameter.to_local(), self._warn))

    def _warn(self) -> None:
        if self._warns:
            self._warns = False
            notice(
                "the gradients of this model are projected and freed during backward, so clipping or changing them has "
                "no effect. Set max_weight_grad_norm to clip them, or max_grad_norm to clip the gradient of the "
                "coefficients."
            )
