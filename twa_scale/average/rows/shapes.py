"""The tensors that have rows, and the rows of a span."""

from collections.abc import Mapping
from math import prod
from typing import NamedTuple

import torch
from torch import nn

from twa_scale.base.spans import Span
from twa_scale.engines.module_names import named_modules
from twa_scale.kernels import Segments

_CONVOLUTIONS = (
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)


def row_lengths(module: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    """Return the number of elements of a row, by tensor, for the tensors that have more than one row.

    A row of a convolution is an output channel. Other rows are vectors along the last dimension: an output of a linear
    layer, an embedding, an output of a stacked expert. Vectors have no rows.

    Args:
        module: the model, or its wrapper.
        shapes: the shapes of real tensors, by name.
    """
    convolutions = {name for name, child in named_modules(module) if isinstance(child, _CONVOLUTIONS)}
    lengths = {}
    for name, shape in shapes.items():
        if len(shape) < 2:
            continue
        parents = name.split(".")[:-1]  # including the parents of parametrizations such as weight normalization
        convolution = any(".".join(parents[:depth]) in convolutions for depth in range(len(parents) + 1))
        count = shape[0] if convolution else prod(shape[:-1])
        if count > 1 and 0 not in shape:
            lengths[name] = prod(shape) // count
    return lengths


class SpanRows(NamedTuple):
    """The rows of a tensor that a span holds, completely or in part."""

    rows: torch.Tensor
    """The indices of the rows in the tensor, (count,), int64."""
    segments: Segments
    """The elements of the span that belong to each row."""
    partial: torch.Tensor
    """Whether only a part of the row is in the span, (count,), bool."""


def rows_of(span: Span, length: int) -> SpanRows:
    """Return the rows of `length` elements that a span holds.

    Args:
        span: a contiguous span, or one of a tensor that is sharded in one dimension.
        length: the number of elements of a row.
    """
    if not span.run:
        segments = Segments(length, span.start % length, len(span))
        rows = span.start // length + torch.arange(segments.count)
    elif span.run >= length:  # whole rows
        segments = Segments(length, 0, len(span))
        starts = torch.arange(span.start, span.stop, span.stride) // length
        rows = (starts[:, None] + torch.arange(span.run // length)).flatten()
    else:  # a part of each row, in one or several runs
        segments = Segments(span.run * (length // span.stride), 0, len(span))
        rows = span.start // length + torch.arange(segments.count)
    first = torch.arange(segments.count) * segments.length - segments.lead
    sizes = (first + segments.length).clamp(max=len(span)) - first.clamp(min=0)
    return SpanRows(rows, segments, sizes < length)
