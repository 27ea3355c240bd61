"""Parameters that every rank holds whole but of which each rank owns only its rows of the basis."""

from collections.abc import Collection, Iterator
from itertools import groupby

import torch
from torch import nn

from twa_scale.comm import Group
from twa_scale.engines.describe import flat
from twa_scale.engines.protocol import Consume
from twa_scale.spans import Span, share

_BUCKET = 1 << 23  # elements per all-gather: large enough to hide latency, small beside the model


class ReplicatedParameters:
    """Splits parameters over a group by equal contiguous parts, and gathers the parts after they are written."""

    def __init__(self, parameters: dict[str, nn.Parameter], group: Group) -> None:
        self._parameters = parameters
        self._group = group

    def __contains__(self, name: str) -> bool:
        return name in self._parameters

    def spans(self) -> list[Span]:
        """Return this rank's part of every parameter; parts of small parameters are empty on the last ranks."""
        return [
            Span(name, *share(p.numel(), self._group.rank, self._group.size)) for name, p in self._parameters.items()
        ]

    def live(self, span: Span) -> torch.Tensor:
        """Return the local memory of a span."""
        return flat(span.name, self._parameters[span.name])[span.start : span.stop]

    def consume(self, consume: Consume, *, averaged: bool) -> None:
        """Hand over this rank's part of every gradient and free it; average over the group first unless `averaged`."""
        for name, parameter in self._parameters.items():
            if not parameter.requires_grad:
                continue
            gradient = parameter.grad
            if not averaged:
                gradient = torch.zeros_like(parameter) if gradient is None else gradient
                self._group.sum_(gradient).div_(self._group.size)
            if gradient is not None:
                start, stop = share(parameter.numel(), self._group.rank, self._group.size)
                consume(Span(name, start, stop), gradient.reshape(-1)[start:stop])
            parameter.grad = None

    def forget(self) -> None:
        """Drop the gradients."""
        for parameter in self._parameters.values():
            parameter.grad = None

    def publish(self, names: Collection[str]) -> None:
        """All-gather the parts of these parameters, in buckets of one dtype."""
        if self._group.size == 1:
            return
        chosen = [name for name in self._parameters if name in names]
        for _, same_dtype in groupby(sorted(chosen, key=self._dtype), key=self._dtype):
            for bucket in self._buckets(list(same_dtype)):
                self._gather(bucket)

    def _dtype(self, name: str) -> str:
        return str(self._parameters[name].dtype)

    def _buckets(self, names: list[str]) -> Iterator[list[str]]:
        bucket: list[str] = []
        size = 0
        for name in names:
            bucket.append(name)
            size += self._parameters[name].numel()
            if size >= _BUCKET:
                yield bucket
                bucket, size = [], 0
        if bucket:
            yield bucket

    def _gather(self, names: list[str]) -> None:
        tensors = [flat(name, self._parameters[name]) for name in names]
        rank, size = self._group.rank, self._group.size
        parts = [share(t.numel(), 0, size)[1] for t in tensors]
        local = tensors[0].new_zeros(sum(parts))
        for piece, tensor in zip(torch.split(local, parts), tensors, strict=True):
            start, stop = share(tensor.numel(), rank, size)
            piece[: stop - start] = tensor[start:stop]
        gathered = local.new_empty(size * len(local))
        self._group.all_gather(gathered, local)
        columns = torch.split(gathered.view(size, -1), parts, dim=1)
        for column, tensor in zip(columns, tensors, strict=True):
            tensor.copy_(column.reshape(-1)[: tensor.numel()])
