"""Spans of boxes of a tensor in its row-major flattening, and their parts."""

from itertools import product
from math import prod

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from twa_scale.base.spans import Span, block


def elements(span: Span) -> list[int]:
    return [i for start, stop in span.runs() for i in range(start, stop)]


@st.composite
def boxes(draw: st.DrawFn) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Draw a shape, and a box of it that is restricted in one or two dimensions."""
    shape = tuple(draw(st.lists(st.integers(1, 5), min_size=1, max_size=4)))
    starts, sizes = [0] * len(shape), list(shape)
    for d in {0, draw(st.integers(0, len(shape) - 1))}:
        starts[d] = draw(st.integers(0, shape[d] - 1))
        sizes[d] = draw(st.integers(0, shape[d] - starts[d]))
    return shape, tuple(starts), tuple(sizes)


@given(boxes())
def test_span_holds_the_elements_of_its_box_in_order(box: tuple[tuple[int, ...], ...]) -> None:
    shape, starts, sizes = box
    tensor = torch.arange(prod(shape)).view(shape)
    part = tensor[tuple(slice(i, i + n) for i, n in zip(starts, sizes, strict=True))]
    span = block("w", shape, starts, sizes)
    assert elements(span) == part.reshape(-1).tolist()
    assert len(span) == part.numel()
    assert [span.element(i) for i in range(len(span))] == part.reshape(-1).tolist()


@given(boxes(), st.integers(1, 20))
def test_pieces_tile_the_span(box: tuple[tuple[int, ...], ...], size: int) -> None:
    span = block("w", *box)
    pieces = list(span.pieces(size))
    assert [i for _, piece in pieces for i in elements(piece)] == elements(span)
    assert all(0 < len(piece) <= size for _, piece in pieces)
    assert [offset for offset, _ in pieces] == [sum(len(p) for _, p in pieces[:i]) for i in range(len(pieces))]


@given(boxes(), st.integers(0, 6), st.integers(0, 6))
def test_part_equals_a_slice(box: tuple[tuple[int, ...], ...], first: int, second: int) -> None:
    span = block("w", *box)
    unit = span.run or 1
    start, stop = (min(i * unit, len(span)) for i in sorted((first, second)))
    assert elements(span.part(start, stop)) == elements(span)[start:stop]


@given(boxes(), st.integers(1, 5))
def test_cuts_tile_the_span_and_stay_in_one_part(box: tuple[tuple[int, ...], ...], first: int) -> None:
    shape, span = box[0], block("w", *box)
    size = prod(shape[1:]) * (first if span.run == 0 else 1)
    indices = list(span.split(size))
    assert [i for _, piece in indices for i in elements(piece)] == elements(span)
    assert [start for start, _ in indices] == [sum(len(cut) for _, cut in indices[:i]) for i in range(len(indices))]
    parts = [{i // size for i in elements(cut)} for _, cut in indices if len(cut)]
    assert all(len(part) == 1 for part in parts) and len(set().union(*parts)) == len(parts)


def test_spans_of_boxes_that_tile_a_tensor_tile_it() -> None:
    actual = []
    for i, j in product(range(2), range(3)):
        actual += elements(block("w", (6, 9, 2), (3 * i, 3 * j, 0), (3, 3, 2)))
    assert sorted(actual) == list(range(6 * 9 * 2))


def test_box_with_unevenly_spaced_runs_raises() -> None:
    with pytest.raises(ValueError, match="evenly spaced"):
        block("w", (4, 4, 4), (0, 0, 0), (4, 2, 2))
