"""The form in which files hold the tensors of a model: unchanged under the name that loaders expect, or restacked."""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod

import torch

from twa_scale.base.spans import Span
from twa_scale.candidates import Candidate
from twa_scale.candidates.complex_tensors import complex_in_files
from twa_scale.candidates.conversion import Made, made
from twa_scale.candidates.dtypes import widest
from twa_scale.candidates.segments import Segment, Segments
from twa_scale.candidates.traced import Traced
from twa_scale.output.file_layout import TensorSpec, spec_of


@dataclass(frozen=True)
class Tensor:
    """A tensor of the model, or of candidates under the model's name."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    as_complex: bool = False
    """Whether the files hold complex numbers. The last dimension of `shape` is that of real and imaginary parts."""


@dataclass(frozen=True)
class StoredForm:
    """The mapping from the tensors of a model to those of the files."""

    specs: Sequence[TensorSpec]
    """The tensors of the files."""
    _itemsize: Mapping[str, int]
    """The bytes of one element in the files, by the name in the model."""
    _names: Mapping[str, Sequence[str]]
    """The names in the files of tensors that are stored unchanged, by the name in the model. Tied ones have several."""
    _made: Mapping[str, Segments]
    """The segments in the files of the other tensors, by the name in the model."""

    @property
    def tensors(self) -> Collection[str]:
        """The names in the model of the tensors that the files hold."""
        return self._itemsize.keys()

    def stored_names(self, name: str) -> Sequence[str]:
        """Return the names of a tensor in the files, or its own name if it is stored in parts of others."""
        return self._names.get(name, (name,))

    def made(self, name: str, shape: tuple[int, ...]) -> Made | None:
        """Return the segments of the files from which a tensor is made, or None if it is stored unchanged."""
        if name not in self._made:
            return None
        shapes = {spec.name: spec.shape for spec in self.specs}
        stored = dict.fromkeys(segment.source.name for segment in self._made[name])
        return Made(shape, self._made[name], {raw: shapes[raw] for raw in stored})

    def nbytes(self, span: Span) -> int:
        """Return the size of a span in the files, in bytes."""
        return len(span) * self._itemsize[span.name] * len(self.stored_names(span.name))

    def spans(self, span: Span, values: torch.Tensor) -> Iterator[tuple[Span, torch.Tensor]]:
        """Yield the spans of the files that hold a span of the model, with their values.

        Args:
            span: a span of a tensor of the model.
            values: its elements, 1-D, of any type and on any device.
        """
        if span.name in self._names:
            for stored in self._names[span.name]:
                yield replace(span, name=stored), values
        else:
            yield from self._made[span.name].spans(span, values)


def form_of_candidates(candidates: Sequence[Candidate], names: Iterable[str], dtype: torch.dtype | None) -> StoredForm:
    """Return the form of the last candidate.

    Args:
        candidates: the candidates.
        names: the tensors to store, by the model's names.
        dtype: the type of floating point tensors in the files; None for the widest type of the candidates.
    """
    last = candidates[-1]
    pairs = complex_in_files(last)
    tensors: dict[str, Tensor] = {}
    stored: dict[str, tuple[str, tuple[int, ...]]] = {}
    segments: dict[str, list[Segment]] = {}
    for name in names:
        tensors[name] = Tensor(last.shape(name), widest(candidates, name), name in pairs)
        if (tensor := made(last, name)) is None:
            stored[last.stored_names[name]] = name, last.shape(name)
            continue
        stored |= {raw: (name, shape) for raw, shape in tensor.stored.items()}
        segments[name] = list(tensor.segments)
    return _form(tensors, stored, segments, dtype)


def form_of_model(tensors: Mapping[str, Tensor], saved: Mapping[str, Traced], dtype: torch.dtype | None) -> StoredForm:
    """Return the form in which the library of a model saves it.

    Args:
        tensors: the tensors of the model.
        saved: the tensors that the library saves, by their names in the files, traced to those of the model. A tensor
            can be saved unchanged under several names.
        dtype: the type of floating point tensors in the files; None for their type in the model.

    Raises:
        ValueError: the library saves elements of a tensor not at all, or in parts twice.
    """
    stored: dict[str, tuple[str, tuple[int, ...]]] = {}
    segments: dict[str, list[Segment]] = {}
    for name, tensor in saved.items():
        shape, origin = tuple(tensor.shape), tensor.origin()
        if origin is not None and tensors[origin].shape == shape:
            stored[name] = origin, shape
            continue
        for segment in tensor.segments(name):
            stored[name] = segment.source.name, shape
            segments.setdefault(segment.source.name, []).append(segment.reversed())
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
    """Return the form of some tensors.

    Args:
        tensors: the tensors of the model, by name.
        stored: for each name in the files the name of a tensor of the model that it holds, at least in part, and its
            shape in the files.
        segments: the segments of tensors that are not stored unchanged, by the name in the model.
        dtype: the type of floating point tensors in the files.
    """
    specs = []
    for raw, (name, shape) in stored.items():
        tensor = tensors[name]
        specs.append(spec_of(raw, shape, tensor.dtype, dtype, as_complex=tensor.as_complex))
    itemsize = {spec.name: spec.dtype.itemsize for spec in specs}
    sizes = {name: itemsize[raw] for raw, (name, _) in stored.items()}
    sizes |= {name: max((itemsize[part.source.name] for part in parts), default=0) for name, parts in segments.items()}
    names: dict[str, list[str]] = {}
    for raw, (name, _) in stored.items():
        if name not in segments:
            names.setdefault(name, []).append(raw)
    return StoredForm(specs, sizes, names, {name: Segments(parts) for name, parts in segments.items()})
