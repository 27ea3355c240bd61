"""Tensors without values that record which elements of stored tensors torch operations put where.

Code that converts checkpoints works on these as on tensors. Operations that only move elements (cat, stack, split,
transpose, reshape, ..) are traced. Others raise an error.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from typing import Any

import torch

from twa_scale.candidates.conversion import Shape, row_major
from twa_scale.candidates.segments import Position, Segment

_MAX_PARTS = 1 << 20  # parts of one tensor


class CannotTrace(Exception):
    """An operation on a traced tensor does more than move elements."""


@dataclass(frozen=True)
class _Part:
    """A box of a traced tensor whose elements are in a stored tensor, evenly spaced in each dimension."""

    starts: Shape
    sizes: Shape
    name: str
    first: int
    strides: Shape

    def narrowed(self, dim: int, start: int, stop: int) -> "_Part | None":
        """Return the part in [start, stop) of a dimension, with positions relative to `start`; None if it is empty."""
        low, high = max(start, self.starts[dim]), min(stop, self.starts[dim] + self.sizes[dim])
        if low >= high:
            return None
        first = self.first + (low - self.starts[dim]) * self.strides[dim]
        return _Part(
            _put(self.starts, dim, low - start), _put(self.sizes, dim, high - low), self.name, first, self.strides
        )

    def replaced(self, dim: int, starts: Shape, sizes: Shape, strides: Shape, skip: int = 1) -> "_Part":
        """Return the part with `skip` dimensions from `dim` on replaced by others."""
        end = dim + skip
        return _Part(
            (*self.starts[:dim], *starts, *self.starts[end:]),
            (*self.sizes[:dim], *sizes, *self.sizes[end:]),
            self.name,
            self.first,
            (*self.strides[:dim], *strides, *self.strides[end:]),
        )

    def permuted(self, dims: Sequence[int]) -> "_Part":
        """Return the part with its dimensions in another order."""
        starts, sizes, strides = (tuple(v[d] for d in dims) for v in (self.starts, self.sizes, self.strides))
        return _Part(starts, sizes, self.name, self.first, strides)

    def shifted(self, dim: int, by: int) -> "_Part":
        """Return the part at a position that is larger by `by` in a dimension."""
        return _Part(_put(self.starts, dim, self.starts[dim] + by), self.sizes, self.name, self.first, self.strides)


class Traced(torch.Tensor):
    """A tensor with shape and type, but without values. It records the origin of its elements."""

    parts: tuple[_Part, ...]

    @staticmethod
    def __new__(cls, shape: Shape, dtype: torch.dtype, parts: Iterable[_Part]) -> "Traced":
        """Create a tensor from parts that tile its shape."""
        make: Any = torch.Tensor._make_wrapper_subclass  # its type annotations are wrong
        made: Traced = make(cls, shape, dtype=dtype, device="meta")
        made.parts = tuple(parts)
        if len(made.parts) > _MAX_PARTS:
            raise CannotTrace(f"a tensor in {len(made.parts)} parts")
        return made

    def __init__(self, shape: Shape, dtype: torch.dtype, parts: Iterable[_Part]) -> None:
        """Do nothing, because `__new__` has initialized the tensor."""

    @classmethod
    def stored(cls, name: str, shape: Shape, dtype: torch.dtype) -> "Traced":
        """Return the stored tensor of this name."""
        return cls(shape, dtype, [_Part((0,) * len(shape), shape, name, 0, row_major(shape))])

    def segments(self, name: str) -> list[Segment]:
        """Return the segments of which the tensor is made. `name` is its own name."""
        strides = row_major(tuple(self.shape))
        return [
            Segment(
                part.sizes,
                Position(name, sum(i * step for i, step in zip(part.starts, strides, strict=True)), strides),
                Position(part.name, part.first, part.strides),
            )
            for part in self.parts
        ]

    def origin(self) -> str | None:
        """Return the name of the stored tensor that has the same elements in the same order, or None."""
        if len(self.parts) != 1:
            return None
        (part,) = self.parts
        is_whole = not part.first and part.sizes == tuple(self.shape)
        return part.name if is_whole and part.strides == row_major(part.sizes) else None

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, function: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = function.overloadpacket.__name__
        if name not in _FUNCTIONS:
            raise CannotTrace(f"{name} cannot be traced")
        return _FUNCTIONS[name](*args, **(kwargs or {}))


def _put(values: Shape, dim: int, value: int) -> Shape:
    return (*values[:dim], value, *values[dim + 1 :])


def _slice(tensor: Traced, dim: int = 0, start: int | None = None, stop: int | None = None, step: int = 1) -> Traced:
    size = tensor.shape[dim]
    if step != 1:
        raise CannotTrace(f"a slice of every {step} elements")
    low, high, _ = slice(start, stop).indices(size)
    dim %= tensor.dim()
    parts = (part.narrowed(dim, low, high) for part in tensor.parts)
    return Traced(_put(tuple(tensor.shape), dim, max(high - low, 0)), tensor.dtype, (p for p in parts if p))


def _select(tensor: Traced, dim: int, index: int) -> Traced:
    index %= tensor.shape[dim]
    return _squeeze(_slice(tensor, dim, index, index + 1), dim)


def _split(tensor: Traced, sizes: int | Sequence[int], dim: int = 0) -> list[Traced]:
    if isinstance(sizes, int):
        size = tensor.shape[dim]
        sizes = [min(sizes, size - start) for start in range(0, size, sizes)]
    ends = [0]
    for size in sizes:
        ends.append(ends[-1] + size)
    return [_slice(tensor, dim, start, stop) for start, stop in pairwise(ends)]


def _unbind(tensor: Traced, dim: int = 0) -> list[Traced]:
    return [_select(tensor, dim, i) for i in range(tensor.shape[dim])]


def _squeeze(tensor: Traced, dims: int | Sequence[int] | None = None) -> Traced:
    chosen = range(tensor.dim()) if dims is None else [dims] if isinstance(dims, int) else dims
    dropped = {dim % tensor.dim() for dim in chosen if tensor.shape[dim] == 1}
    return _view(tensor, [size for dim, size in enumerate(tensor.shape) if dim not in dropped])


def _unsqueeze(tensor: Traced, dim: int) -> Traced:
    dim %= tensor.dim() + 1
    return _view(tensor, [*tensor.shape[:dim], 1, *tensor.shape[dim:]])


def _permute(tensor: Traced, dims: Sequence[int]) -> Traced:
    dims = [dim % tensor.dim() for dim in dims]
    return Traced(tuple(tensor.shape[d] for d in dims), tensor.dtype, (part.permuted(dims) for part in tensor.parts))


def _transpose(tensor: Traced, first: int = 0, second: int = 1) -> Traced:
    dims = list(range(tensor.dim()))
    if dims:
        dims[first], dims[second] = dims[second], dims[first]
    return _permute(tensor, dims)


def _t(tensor: Traced) -> Traced:
    return _transpose(tensor) if tensor.dim() == 2 else tensor


def _cat(tensors: Sequence[Traced], dim: int = 0) -> Traced:
    first = tensors[0]
    if other := next((item for item in tensors if not isinstance(item, Traced) or item.dtype != first.dtype), None):
        raise CannotTrace(f"joining tensors of {first.dtype} and {other.dtype}")
    dim %= first.dim()
    parts: list[_Part] = []
    size = 0
    for tensor in tensors:
        expected, actual = _put(tuple(first.shape), dim, 0), _put(tuple(tensor.shape), dim, 0)
        if expected != actual:
            raise CannotTrace(f"joining tensors of shapes {tuple(first.shape)} and {tuple(tensor.shape)}")
        parts += [part.shifted(dim, size) for part in tensor.parts]
        size += tensor.shape[dim]
    return Traced(_put(tuple(first.shape), dim, size), first.dtype, parts)


def _stack(tensors: Sequence[Traced], dim: int = 0) -> Traced:
    return _cat([_unsqueeze(tensor, dim) for tensor in tensors], dim)


def _view(tensor: Traced, shape: Sequence[int]) -> Traced:
    """Return the same elements, in row-major order, in another shape."""
    new = _inferred(tensor.numel(), shape)
    old = tuple(tensor.shape)
    if prod(new) != tensor.numel():
        raise CannotTrace(f"a view of {old} as {new}")
    if not tensor.numel():
        return Traced(new, tensor.dtype, ())
    parts = list(tensor.parts)
    # Start at the last dimension, so that the indices of earlier ones do not change.
    for start, stop, sizes in reversed(list(_groups(old, new))):
        if old[start:stop] == sizes:
            continue
        for dim in range(stop - 1, start, -1):
            parts = [merged for part in parts for merged in _merged(part, dim - 1, prod(old[dim:stop]))]
        if start == stop:
            parts = [part.replaced(start, (0,), (1,), (1,), skip=0) for part in parts]
        for i in range(len(sizes) - 1):
            parts = [piece for part in parts for piece in _divided(part, start + i, prod(sizes[i + 1 :]))]
        if not sizes:
            parts = [part.replaced(start, (), (), ()) for part in parts]
    return Traced(new, tensor.dtype, parts)


def _inferred(numel: int, shape: Sequence[int]) -> Shape:
    known = prod(size for size in shape if size != -1)
    return tuple(numel // known if size == -1 else size for size in shape)


def _groups(old: Shape, new: Shape) -> Iterator[tuple[int, int, Shape]]:
    """Yield the smallest runs of dimensions (start, stop) of `old`, with those of `new` that have as many elements."""
    i = j = 0
    while i < len(old) or j < len(new):
        start, first = i, j
        before, after = 1, 1
        if i < len(old):
            before, i = old[i], i + 1
        if j < len(new):
            after, j = new[j], j + 1
        while before != after:
            if before < after:
                before, i = before * old[i], i + 1
            else:
                after, j = after * new[j], j + 1
        yield start, i, new[first:j]


def _merged(part: _Part, dim: int, inner: int) -> Iterator[_Part]:
    """Merge dimension `dim` with the next one, which has `inner` elements."""
    (start, next_start), (size, next_size) = part.starts[dim : dim + 2], part.sizes[dim : dim + 2]
    step, next_step = part.strides[dim : dim + 2]
    if size == 1 or (next_size == inner and (step == next_step * inner or inner == 1)):
        numel = size * next_size
        yield part.replaced(dim, (start * inner + next_start,), (numel,), (step if inner == 1 else next_step,), skip=2)
        return
    for i in range(size):
        piece = part.narrowed(dim, start + i, start + i + 1)
        assert piece is not None
        yield piece.replaced(dim, ((start + i) * inner + next_start,), (next_size,), (next_step,), skip=2)


def _divided(part: _Part, dim: int, inner: int) -> Iterator[_Part]:
    """Divide dimension `dim` into one of any size and one of `inner` elements."""
    start, stop, step = part.starts[dim], part.starts[dim] + part.sizes[dim], part.strides[dim]
    # Up to three boxes: the end of a row, whole rows, the beginning of a row.
    low, high = -(-start // inner) * inner, stop // inner * inner
    ends = [start, stop] if low > high else [start, low, high, stop]
    for begin, end in pairwise(ends):
        piece = part.narrowed(dim, begin, end)
        if piece is None:
            continue
        count = max((end - begin) // inner, 1)
        yield piece.replaced(
            dim, (begin // inner, begin % inner), (count, (end - begin) // count), (step * inner, step)
        )


def _same(tensor: Traced, **_: Any) -> Traced:
    return Traced(tuple(tensor.shape), tensor.dtype, tensor.parts)


_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "alias": _same,
    "cat": _cat,
    "clone": _same,
    "detach": _same,
    "permute": _permute,
    "_reshape_alias": lambda tensor, shape, _: _view(tensor, shape),
    "select": _select,
    "slice": _slice,
    "split": _split,
    "split_with_sizes": _split,
    "squeeze": _squeeze,
    "stack": _stack,
    "t": _t,
    "transpose": _transpose,
    "unbind": _unbind,
    "_unsafe_view": _view,
    "unsqueeze": _unsqueeze,
    "view": _view,
}
