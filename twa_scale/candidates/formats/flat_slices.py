"""Slices of a tensor's row-major flattening, whatever its layout in memory."""

import torch


def copy_flat(tensor: torch.Tensor, start: int, out: torch.Tensor) -> None:
    """Fill 1-D `out` with elements [start, start + len(out)) of `tensor` in row-major order.

    A tensor that is not contiguous (a transpose, channels_last, an expanded one) is never materialized as a
    whole: the range is cut into a partial row, whole rows and a partial row, down the dimensions.
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
