"""Marks in place of gradients that backward has projected and freed, so that later uses of them are noticed."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.hooks import RemovableHandle, unserializable_hook

from twa_scale.base.notices import notice
from twa_scale.base.weak import weak_method
from twa_scale.engines.dtensor_spans import like_parameter
from twa_scale.engines.private_attributes import require
from twa_scale.errors import EngineError

_TORCH = ("_current_graph_task_id", "_disabled_torch_function_impl", "_set_throw_on_mutable_data_ptr")


class ProjectedGradient(torch.Tensor):
    """A tensor of zeros without memory. Copies of it, and what is saved or printed of it, are tensors of zeros.

    Args:
        like: has the shape, strides and device.
        dtype: the type of the elements.
        on_use: called before each operation on the tensor.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]  # results are plain tensors

    def __new__(cls, like: torch.Tensor, dtype: torch.dtype, on_use: Callable[[], None]) -> "ProjectedGradient":
        """Make the tensor. Its storage has no bytes and no address, for code that reads or shares the memory."""
        mark = torch.Tensor._make_wrapper_subclass(
            cls, like.shape, strides=like.stride(), dtype=dtype, device=like.device, storage_size=0
        )
        torch._C._set_throw_on_mutable_data_ptr(mark)
        return mark

    def __init__(self, like: torch.Tensor, dtype: torch.dtype, on_use: Callable[[], None]) -> None:
        super().__init__()
        self._on_use = on_use

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch's annotation lacks the defaults
        cls, operation: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call `operation` with zeros. A view of the same shape, needed to make a DTensor, does not count as use."""
        mark = next(value for value in tree_leaves((args, kwargs)) if isinstance(value, cls))
        if operation is torch.ops.aten.view.default and tuple(args[1]) == mark.shape:
            return cls(mark, mark.dtype, mark._on_use)
        in_backward = torch._C._current_graph_task_id() >= 0
        if operation is torch.ops.aten.add_.Tensor and isinstance(args[0], cls) and in_backward:
            raise EngineError(
                "backward has added a gradient to one that it has projected and freed, where it would be lost: the "
                "hooks of the parameter are gone (`to()` of a module with DTensors removes them), or several threads "
                "run backward. Attach after to(), and run backward in one thread."
            )
        mark._on_use()
        aliases = [argument.alias_info for argument in operation._schema.arguments]
        written = tree_leaves([value for value, alias in zip(args, aliases, strict=False) if alias and alias.is_write])
        if written and all(isinstance(value, cls) for value in written) and operation.namespace == "aten":
            return args[0] if operation._schema.returns else None

        # One element in place of all, so that a norm over a model needs no memory. Operations that write to an argument
        # need all, and those of other libraries: collectives write, and their schemas do not say so.
        one_element = operation.namespace == "aten" and not any(aliases)

        def as_zeros(value: Any) -> Any:
            if not isinstance(value, cls):
                return value
            shape = () if one_element else value.shape
            return torch.zeros(shape, dtype=value.dtype, device=value.device).expand(value.shape)

        return operation(*tree_map(as_zeros, args), **tree_map(as_zeros, kwargs or {}))

    def __iadd__(self, gradient: torch.Tensor) -> torch.Tensor:  # type: ignore[override, misc]
        """Return `gradient`: FSDP2 adds the gradients of several backward passes with this operator."""
        return gradient if isinstance(gradient, torch.Tensor) else self.add_(gradient)

    def __dlpack__(self, **options: Any) -> Any:
        """Return zeros for other libraries, which would read the memory."""
        return self.clone().__dlpack__(**options)

    def __repr__(self, **options: Any) -> str:  # type: ignore[override]
        """Return the text of zeros."""
        return str(self.clone().__repr__(**options))

    def tolist(self) -> Any:
        """Return zeros."""
        return self.clone().tolist()

    def numpy(self, **options: Any) -> Any:
        """Return zeros."""
        return self.clone().numpy(**options)

    def __array__(self, *arguments: Any, **options: Any) -> Any:
        """Return zeros."""
        return self.clone().__array__(*arguments, **options)

    def __deepcopy__(self, memo: dict[int, Any]) -> torch.Tensor:
        """Return zeros."""
        return self.clone()

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle zeros, without `on_use`."""
        return self.clone().__reduce_ex__(protocol)


class ProjectedGradients:
    """The marks in a model: `grad` of each parameter whose gradient was projected and freed is a mark until the step.

    Code that clips or scales gradients skips parameters without one. If it uses a mark, there is a warning. A mark that
    is gone before the step shows that code has discarded or replaced the gradient, which is an error.

    Args:
        warns: whether this rank issues the warning.

    Raises:
        EngineError: this version of torch lacks private attributes that are used.
    """

    def __init__(self, *, warns: bool) -> None:
        require("torch", torch._C, _TORCH)
        self._warns = warns
        self._on_use = weak_method(self._warn)  # Python does not find cycles through the views of marks in DTensors
        self._marks: dict[str, torch.Tensor] = {}  # by name of the parameter; they are used again in the next step
        self._marked: dict[str, torch.Tensor] = {}  # the parameters whose gradient is a mark now
        self._lost: str | None = None

    def register(self, name: str, parameter: torch.Tensor) -> RemovableHandle:
        """Remove the mark of this parameter before autograd accumulates a gradient, which would be lost in the mark.

        FSDP2 accumulates without autograd: `ProjectedGradient.__iadd__`. `torch.autograd.grad` removes the mark, too.
        """

        def remove(_: torch.Tensor) -> None:
            if name in self._marked and parameter.grad is self._marks[name]:
                del self._marked[name]
                parameter.grad = None

        handle: RemovableHandle = parameter.register_hook(unserializable_hook(remove))  # pickled without a warning
        return handle

    def add(self, name: str, parameter: torch.Tensor) -> None:
        """Replace the gradient of the parameter of this name by a mark."""
        gradient, mark = parameter.grad, self._marks.get(name)
        assert gradient is not None
        if name in self._marked and gradient is not mark:
            self._lost = self._lost or name
        if gradient is mark:  # FSDP2 has replaced its local part by the next gradient
            assert isinstance(mark, DTensor)
            mark._local_tensor = ProjectedGradient(mark._local_tensor, mark.dtype, self._on_use)
        elif mark is None or (mark.dtype, mark.device) != (gradient.dtype, gradient.device) or _has_memory(mark):
            mark = self._marks[name] = self._mark(parameter, gradient.dtype)
        parameter.grad = mark
        self._marked[name] = parameter

    @staticmethod
    def is_mark(gradient: torch.Tensor) -> bool:
        """Return whether a gradient, or the local part of it, is a mark."""
        return isinstance(_local(gradient), ProjectedGradient)

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
                f"the gradient of {lost!r} was discarded or replaced (model.zero_grad(), `.grad = ..`, `.grad += ..`), "
                "but backward has projected it already, so it would count in this step. Call zero_grad() of the "
                "average to discard gradients; add terms to the loss instead of to a gradient."
            )

    def _mark(self, parameter: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        if not isinstance(parameter, DTensor):
            return ProjectedGradient(parameter, dtype, self._on_use)
        require("torch", parameter, ["_local_tensor"])
        with torch.no_grad():
            return like_parameter(parameter, ProjectedGradient(parameter.to_local(), dtype, self._on_use))

    def _warn(self) -> None:
        if self._warns:
            self._warns = False
            notice(
                "the gradients of this model are projected and freed during backward, so their norm is 0, and "
                "clipping, changing or zeroing them has no effect. Set max_weight_grad_norm to clip them, or "
                "max_grad_norm to clip the gradient of the coefficients. Call zero_grad() of the average to discard "
                "them."
            )


def _local(gradient: torch.Tensor) -> torch.Tensor:
    return gradient.to_local() if isinstance(gradient, DTensor) else gradient


def _has_memory(mark: torch.Tensor) -> bool:
    """Return whether other code has given memory to a mark, as `to(dtype)` of a module does."""
    return _local(mark).untyped_storage().nbytes() > 0
