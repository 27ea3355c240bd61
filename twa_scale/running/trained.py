"""A copy of the trained weights of this rank while the model holds other weights."""

from collections.abc import Mapping

import torch

from twa_scale.base.spans import Span


class TrainedCopy:
    """Holds the weights in their own type from `keep` until `restore`.

    Args:
        device: the device of the copy; by default, the device of the weights.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        self._device = device
        self._has_copy = False
        self._weights: dict[Span, torch.Tensor] = {}
        self._buffers: dict[str, torch.Tensor] = {}

    @property
    def has_copy(self) -> bool:
        """Whether there is a copy."""
        return self._has_copy

    @property
    def nbytes(self) -> int:
        """The bytes of the copy."""
        return sum(tensor.nbytes for tensors in (self._weights, self._buffers) for tensor in tensors.values())

    @torch.no_grad()
    def keep(self, live: Mapping[Span, torch.Tensor], buffers: Mapping[str, torch.Tensor]) -> None:
        """Copy the weights. Does nothing if there is a copy."""
        if self._has_copy:
            return
        self._weights = {span: values.to(self._device, copy=True) for span, values in live.items()}
        self._buffers = {name: buffer.clone() for name, buffer in buffers.items()}
        self._has_copy = True

    @torch.no_grad()
    def restore(self, live: Mapping[Span, torch.Tensor], buffers: Mapping[str, torch.Tensor]) -> bool:
        """Write the copy into the model, free it, and return whether there was one, which is equal on every rank."""
        if not self._has_copy:
            return False
        for span, values in self._weights.items():
            live[span].copy_(values)
        for name in self._buffers.keys() & buffers.keys():
            buffers[name].copy_(self._buffers[name])
        self.forget()
        return True

    def forget(self) -> None:
        """Free the copy."""
        self._has_copy, self._weights, self._buffers = False, {}, {}
