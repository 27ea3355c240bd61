"""Slices of the row-major flattening of a tensor with any strides."""

import torch


def copy_flat(tensor: torch.Tensor, start: int, out: torch.Tensor) -> None:
    """Fill the 1-D tensor `out` with elements [start, start + len(out)) of `tensor` in row-major order.

    No contiguous copy of a transposed, channels_last or expanded tensor is made. The range is split recursively into a
    partial row, whole rows and a partial row.
    """
    count = out.numel()
    if count == 0:
        return
    if tensor.is_contiguous():
        out.copy_(tensor.view(-1)[start : start + count])
        return
    row = tensor[0].numel()
    first, offset = divmod(start, row)
    head = min(-offset % row, count)
    if head:
        copy_flat(tensor[first], offset, out[:head])
        first += 1
    rows = (count - head) // row
    tail = head + rows * row
    if rows:
        out[head:tail].view(rows, *tensor.shape[1:]).copy_(tensor[first : first + rows])
    if tail < count:
        copy_flat(tensor[first + rows], 0, out[tail:])
