"""Tensors made of segments of others: operations on traced tensors are recorded, and ranges are read and written."""

import random
from collections.abc import Callable
from itertools import pairwise
from math import prod
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from twa_scale.average.state.schema import MadeState
from twa_scale.base.spans import Span
from twa_scale.candidates.segments import Segments
from twa_scale.candidates.traced import CannotTrace, Traced

Make = Callable[..., torch.Tensor]
MAKES: dict[str, tuple[Make, list[tuple[int, ...]]]] = {
    "experts": (lambda a, b, c, d: torch.cat([torch.stack([a, b]), torch.stack([c, d])], 1), [(3, 4)] * 4),
    "a third": (lambda a: torch.chunk(a, 3)[1], [(6, 4)]),
    "columns": (lambda a: torch.split(a, [1, 2, 3], 1)[2].squeeze(), [(2, 6, 1)]),
    "transposed experts": (lambda a: a.transpose(1, 2).contiguous(), [(3, 4, 5)]),
    "transposed, joined": (lambda a, b: torch.cat([a, b], 1).t(), [(4, 3), (4, 2)]),
    "rotary order": (lambda a: a.view(2, 2, 3, 5).transpose(1, 2).reshape(12, 5), [(12, 5)]),
    "interleaved": (lambda a: a.reshape(2, 3, 2).transpose(1, 2).reshape(2, 6), [(2, 6)]),
    "convolution": (lambda a: a.reshape(3, -1), [(3, 2, 2, 2, 2)]),
    "cut across rows": (lambda a: a.reshape(4, 3, 2).transpose(1, 2).reshape(24)[5:20].view(5, 3), [(24,)]),
    "joined, split elsewhere": (lambda a, b: torch.cat([a, b], 1).reshape(2, 2, 5).permute(2, 0, 1), [(4, 3), (4, 2)]),
    "scalars": (lambda a, b: torch.stack([a.view(()), b]), [(1,), ()]),
    "nothing": (lambda a: a[:, :0], [(2, 3)]),
}


def stored(shapes: list[tuple[int, ...]]) -> dict[str, torch.Tensor]:
    """Return tensors whose elements are all different."""
    numbers = iter(torch.arange(sum(map(prod, shapes))).split([prod(shape) for shape in shapes]))
    return {f"t{i}": next(numbers).view(shape) for i, shape in enumerate(shapes)}


def traced(make: Make, tensors: dict[str, torch.Tensor]) -> Traced:
    made = make(*(Traced.stored(name, tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()))
    assert isinstance(made, Traced)
    return made


def read(segments: Segments, tensors: dict[str, torch.Tensor], start: int, stop: int) -> torch.Tensor:
    out = torch.full((stop - start,), -1)
    for part in segments.within(start, stop):
        part = part.in_source_order()
        runs = [tensors[span.name].reshape(-1)[slice(*run)] for span in part.spans() for run in span.runs()]
        place = part.of(out, start)
        place.copy_(torch.cat(runs).view(place.shape))
    return out


@pytest.mark.parametrize("name", MAKES)
def test_every_range_of_traced_tensors_equals_that_of_torch(name: str) -> None:
    make, shapes = MAKES[name]
    tensors = stored(shapes)
    expected, made = make(*tensors.values()), traced(make, tensors)
    assert made.shape == expected.shape
    segments = Segments(made.segments("x"))
    for start in range(expected.numel() + 1):
        for stop in range(start, expected.numel() + 1):
            assert torch.equal(read(segments, tensors, start, stop), expected.reshape(-1)[start:stop]), (start, stop)


@pytest.mark.parametrize("seed", range(20))
def test_any_order_of_functions_is_followed(seed: int) -> None:
    def make(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        rng, x = random.Random(seed), a
        for _ in range(6):
            dim = rng.randrange(x.dim())
            match rng.choice(["cat", "stack", "chunk", "permute", "view", "select"]):
                case "cat" if x.shape == b.shape:
                    x = torch.cat([x, b], dim)
                case "stack":
                    x = torch.stack([x, x.clone()], dim)
                case "chunk":
                    x = rng.choice(torch.chunk(x, 2, dim))
                case "permute":
                    x = x.permute(rng.sample(range(x.dim()), x.dim()))
                case "view":
                    x = x.reshape(*x.shape[:dim], -1)
                case "select" if x.dim() > 2:
                    x = x.select(dim, rng.randrange(x.shape[dim]))
        return x

    tensors = stored([(4, 3, 4), (4, 3, 4)])
    expected, made = make(*tensors.values()), traced(make, tensors)
    assert made.shape == expected.shape
    parts = sorted(random.Random(seed).sample(range(expected.numel() + 1), min(6, expected.numel())))
    for start, stop in pairwise(parts):
        actual = read(Segments(made.segments("x")), tensors, start, stop)
        assert torch.equal(actual, expected.reshape(-1)[start:stop])


@pytest.mark.parametrize("span", [Span("x", 0, 48), Span("x", 7, 31), Span("x", 1, 46, run=3, stride=6)])
def test_span_is_written_to_its_position(span: Span) -> None:
    make, shapes = MAKES["experts"]
    tensors = stored(shapes)
    segments = Segments(traced(make, tensors).segments("x"))
    values = torch.cat([make(*tensors.values()).reshape(-1)[start:stop] for start, stop in span.runs()])
    written = {name: torch.full((tensor.numel(),), -1) for name, tensor in tensors.items()}
    for other, part in segments.spans(span, values):
        runs = list(other.runs())
        for (start, stop), run in zip(runs, part.split([stop - start for start, stop in runs]), strict=True):
            written[other.name][start:stop] = run
    actual = torch.cat(list(written.values()))
    assert torch.equal(actual[actual >= 0].sort().values, values.sort().values)
    assert torch.equal(actual[values], values)  # number i is at position i


@pytest.mark.parametrize("make", [lambda a: a + 1, lambda a: a.to(torch.int32), lambda a: a[::2], torch.abs])
def test_conversions_that_compute_raise(make: Make) -> None:
    with pytest.raises(CannotTrace):
        traced(make, stored([(4, 3)]))


def test_unchanged_traced_tensors_are_detected() -> None:
    tensor: Any = Traced.stored("a", (4, 3), torch.float32)
    assert tensor.origin() == tensor.clone().contiguous().origin() == "a"
    assert tensor.t().origin() is None and tensor.view(12).origin() == "a" and tensor[1:].origin() is None


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ([0, 0, 0, 3, 2, 1, 3], None),
        ([0, 1, 0, 3, 2, 1, 3], "not inside of the model's tensor and 'a'"),
        ([0, 0, 0, 2, 3, 1, 3], "not inside"),
        ([0, 6, 0, 1, 1, 1, 1], "not inside"),
        ([0, 0, 1, 3, 2, 1, 3], "not inside"),
        ([0, 0, 0, 3, 2, 1, 4], "not inside"),
        ([0, 0, 0, 3, 1, 1, 3], "they have 3 elements, their tensor has 6"),
        ([1, 0, 0, 3, 2, 1, 3], "out of range"),
    ],
)
def test_a_state_holds_only_boxes_inside_of_their_tensors(row: list[int], message: str | None) -> None:
    """A row has the index of the stored tensor, both first positions, the sizes, and the stored strides."""
    state = {"shape": (3, 2), "stored": {"a": (2, 3)}, "segments": torch.tensor([row])}
    if message is None:
        MadeState.model_validate(state)
        return
    with pytest.raises(ValidationError, match=message):
        MadeState.model_validate(state)
