"""What files hold of the tensors of a model: each as it is, under the name that loaders expect, or in other tensors."""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod

import torch

from twa_scale.base.spans import Span
from twa_scale.candidates import Candidate
from twa_scale.candidates.complex_tensors import complex_in_files
from twa_scale.candidates.dtypes import widest
from twa_scale.candidates.made import made
from twa_scale.candidates.segments import Segment, Segments
from twa_scale.candidates.traced import Traced
from twa_scale.output.file_layout import TensorSpec, spec_of


@dataclass(frozen=True)
class Tensor:
    """A tensor of the model, or of candidates under the model's name."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    pairs: bool = False
    """Whether it is complex in files, and has a last dimension of real and imaginary part here."""


@dataclass(frozen=True)
class StoredForm:
    """Says for each tensor what of the files it is."""

    specs: Sequence[TensorSpec]
    """What the files hold."""
    _itemsize: Mapping[str, int]
    """Bytes of an element in the files, by the name of a tensor here."""
    _names: Mapping[str, str]
    """The names in the files of tensors that are stored as they are."""
    _made: Mapping[str, Segments]
    """What the other tensors are in the files."""

    def nbytes(self, span: Span) -> int:
        """Return what a span takes in the files."""
        return len(span) * self._itemsize[span.name]

    def spans(self, span: Span, values: torch.Tensor) -> Iterator[tuple[Span, torch.Tensor]]:
        """Yield what a span is in the files, and the values of each.

        Args:
            span: of a tensor here.
            values: 1-D, its elements, of any type and on any device.
        """
        if span.name in self._names:
            yield replace(span, name=self._names[span.name]), values
        else:
            yield from self._made[span.name].spans(span, values)


def form_of_candidates(candidates: Sequence[Candidate], names: Iterable[str], dtype: torch.dtype | None) -> StoredForm:
    """Return the form of the last candidate, for its tensors `names`; floating point ones as `dtype`, or the widest."""
    last = candidates[-1]
    pairs = complex_in_files(last)
    tensors: dict[str, Tensor] = {}
    stored: dict[str, tuple[str, tuple[int, ...]]] = {}
    segments: dict[str, list[Segment]] = {}
    for name in names:
        tensors[name] = Tensor(last.shape(name), widest(candidates, name), name in pairs)
        if (whole := made(last, name)) is None:
            stored[last.stored_names[name]] = name, last.shape(name)
            continue
        for segment in whole.segments:
            raw, shape = whole.stored[segment.there.name]
            stored[raw] = name, shape
            segments.setdefault(name, []).append(replace(segment, there=segment.there._replace(name=raw)))
    return _form(tensors, stored, segments, dtype)


def form_of_model(tensors: Mapping[str, Tensor], saved: Mapping[str, Traced], dtype: torch.dtype | None) -> StoredForm:
    """Return the form in which the library of a model saves it.

    Args:
        tensors: of the model.
        saved: what the library makes of them, by its names.
        dtype: of floating point tensors in the files; their own when not given.

    Raises:
        ValueError: a tensor of which a part is left out, or saved twice.
    """
    stored: dict[str, tuple[str, tuple[int, ...]]] = {}
    segments: dict[str, list[Segment]] = {}
    for name, tensor in saved.items():
        shape, origin = tuple(tensor.shape), tensor.origin()
        if origin is not None and tensors[origin].shape == shape:
            stored[name] = origin, shape
            continue
        for segment in tensor.segments(name):
            stored[name] = segment.there.name, shape
            segments.setdefault(segment.there.name, []).append(segment.reversed())
    counts = {name: sum(segment.numel for segment in parts) for name, parts in segments.items()}
    counts |= {name: prod(shape) for name, shape in stored.values() if name not in segments}
    if wrong := [name for name, tensor in tensors.items() if counts.get(name) != prod(tensor.shape)]:
        raise ValueError(f"{counts.get(wrong[0], 0)} elements of {wrong[0]!r} are saved")
    return _form(tensors, stored, segments, dtype)


def _form(
    tensors: Mapping[str, Tensor],
    stored: Mapping[str, tuple[str, tuple[int, ...]]],
    segments: Mapping[str, Collection[Segment]],
    dtype: torch.dtype | None,
) -> StoredForm:
    """Return a form.

    Args:
        tensors: by name here.
        stored: by name in the files: the name of the tensor here that it is, or is a part of, and the shape there.
        segments: of the tensors here that are not stored as they are.
        dtype: of floating point tensors in the files.
    """
    specs = []
    for raw, (name, shape) in stored.items():
        tensor = tensors[name]
        specs.append(spec_of(raw, shape, tensor.dtype, dtype, pairs=tensor.pairs))
    sizes = {name: spec.dtype.itemsize for (name, _), spec in zip(stored.values(), specs, strict=True)}
    names = {name: raw for raw, (name, _) in stored.items() if name not in segments}
    return StoredForm(specs, sizes, names, {name: Segments(parts) for name, parts in segments.items()})
