"""Parameters that every rank holds whole, with the basis split over the ranks."""

from collections.abc import Collection, Iterator, Mapping
from itertools import groupby

import torch

from twa_scale.base.spans import Span, share
from twa_scale.engines.engine import Consume
from twa_scale.engines.parameters import flat_gradient, flat_view, memory_version, require_shape
from twa_scale.ranks import Group

_BUCKET = 1 << 23  # elements per all-gather: large enough to hide latency, small compared with the model


def buckets(parameters: Mapping[str, torch.Tensor]) -> Iterator[list[str]]:
    """Yield buckets of tensor names. The tensors of a bucket have one dtype and are sent in one collective."""

    def dtype(name: str) -> str:
        return str(parameters[name].dtype)

    for _, same_dtype in groupby(sorted(parameters, key=dtype), key=dtype):
        bucket: list[str] = []
        size = 0
        for name in same_dtype:
            bucket.append(name)
            size += parameters[name].numel()
            if size >= _BUCKET:
                yield bucket
                bucket, size = [], 0
        if bucket:
            yield bucket


class ReplicatedParameters:
    """Parameters that are split over a group into equal contiguous parts, and gathered after the parts are written.

    Args:
        parameters: contiguous tensors by name, which every rank of `group` holds whole.
        group: the ranks over which the parts are split.
        units: for some names a number of elements; the sizes of parts are multiples of it.
    """

    def __init__(
        self, parameters: Mapping[str, torch.Tensor], group: Group, units: Mapping[str, int] | None = None
    ) -> None:
        self._parameters = parameters
        self._shapes = {name: parameter.shape for name, parameter in parameters.items()}
        self._group = group
        self._units = units or {}

    def __contains__(self, name: str) -> bool:
        return name in self._parameters

    def parameters(self) -> Collection[torch.Tensor]:
        """Return the tensors."""
        return self._parameters.values()

    def spans(self) -> list[Span]:
        """Return this rank's part of every parameter; parts of small parameters are empty on the last ranks."""
        return [Span(name, *self._part(name, self._group.rank)) for name in self._parameters]

    def live(self, span: Span) -> torch.Tensor:
        """Return the local memory of a span."""
        return self._flat(span.name)[span.start : span.stop]

    def changed(self, names: Collection[str]) -> dict[str, object]:
        """Return address and version of the memory of those `names` that are held here.

        Raises:
            EngineError: a parameter has another shape than before.
        """
        own = {name: self._parameters[name] for name in names if name in self._parameters}
        for name, parameter in own.items():
            require_shape(name, parameter, self._shapes[name])
        return {name: memory_version(parameter) for name, parameter in own.items()}

    def consume(self, consume: Consume, average_over: Collection[Group]) -> None:
        """Pass on this rank's part of every gradient and free it. Collective in `average_over`.

        Args:
            consume: takes the parts.
            average_over: the gradients are averaged over these groups first.
        """
        for name, parameter in self._parameters.items():
            if not parameter.requires_grad:
                continue
            gradient = None if parameter.grad is None else flat_gradient(parameter.grad)
            if average_over:
                missing = gradient is None
                gradient = torch.zeros_like(parameter).reshape(-1) if gradient is None else gradient
                for group in average_over:
                    group.sum_(gradient).div_(group.size)
                if missing and not gradient.any():  # no rank had a gradient
                    continue
            if gradient is not None:
                start, stop = self._part(name, self._group.rank)
                consume(Span(name, start, stop), gradient[start:stop])
            parameter.grad = None

    def forget(self) -> None:
        """Drop the pending gradients."""
        for parameter in self._parameters.values():
            parameter.grad = None

    def publish(self, names: Collection[str]) -> None:
        """All-gather the parts of these parameters, in buckets of one dtype, large parameters in pieces. Collective."""
        if self._group.size == 1:
            return
        selected = {name: p for name, p in self._parameters.items() if name in names}
        large = [name for name, parameter in selected.items() if parameter.numel() > _BUCKET]
        for bucket in buckets({name: p for name, p in selected.items() if name not in large}):
            self._gather(bucket)
        for name in large:
            self._gather_in_pieces(name)

    def _flat(self, name: str) -> torch.Tensor:
        return flat_view(name, self._parameters[name], self._shapes[name])

    def _part(self, name: str, rank: int) -> tuple[int, int]:
        unit = self._units.get(name, 1)
        start, stop = share(self._parameters[name].numel() // unit, rank, self._group.size)
        return start * unit, stop * unit

    def _gather(self, names: list[str]) -> None:
        tensors = [self._flat(name) for name in names]
        size = self._group.size
        parts = [self._part(name, 0)[1] for name in names]
        local = tensors[0].new_zeros(sum(parts))
        for name, piece, tensor in zip(names, torch.split(local, parts), tensors, strict=True):
            start, stop = self._part(name, self._group.rank)
            piece[: stop - start] = tensor[start:stop]
        gathered = local.new_empty(size * len(local))
        self._group.all_gather(gathered, local)
        columns = torch.split(gathered.view(size, -1), parts, dim=1)
        for column, tensor in zip(columns, tensors, strict=True):
            tensor.copy_(column.reshape(-1)[: tensor.numel()])

    def _gather_in_pieces(self, name: str) -> None:
        """Gather a large parameter in pieces, so that no second copy of it is in memory."""
        tensor, size = self._flat(name), self._group.size
        part, (start, stop) = self._part(name, 0)[1], self._part(name, self._group.rank)
        full = tensor.numel() // part  # the number of ranks with a complete part; one more may hold the rest
        parts, rest = tensor[: full * part].view(full, part), tensor[full * part :]
        for piece in (slice(begin, begin + _BUCKET // size) for begin in range(0, part, _BUCKET // size)):
            own_part = tensor[start:stop][piece]
            local = tensor.new_zeros(parts[0, piece].shape)
            local[: len(own_part)] = own_part
            gathered = local.new_empty(size, len(local))
            self._group.all_gather(gathered.view(-1), local)
            parts[:, piece] = gathered[:full]
            rest[piece] = gathered[min(full, size - 1), : len(rest[piece])]
