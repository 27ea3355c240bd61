"""The rounding errors of packed stores, and the choice of the coding with the smaller ones."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import accumulate
from math import prod

import torch

from twa_scale.candidates import Candidate
from twa_scale.config import TwaConfig
from twa_scale.kernels import Coding, Kernels, Packed, RowMap, Target, choose_kernels, of_deltas, of_increments
from twa_scale.kernels.packed_rows import BLOCKS
from twa_scale.ranks import Ranks
from twa_scale.store import bits_of

_SAMPLE = max(BLOCKS.values())  # elements of a sample: one block
_SAMPLES = 1024  # largest number of samples over all ranks
_SAMPLED_BYTES = 8 << 20  # largest number of bytes of the samples of all candidates in float32
_THREADS = 8


@dataclass(frozen=True)
class Rounding:
    """The rounding errors of a packed store."""

    store: str
    coding: str
    """`increments` or `center`."""
    errors: tuple[float, ...]
    """For each candidate, the norm of the error of its weights divided by the norm of its delta; 0 for a zero delta."""

    @classmethod
    def measured(cls, store: str, coding: RowMap, errors: torch.Tensor, gram: torch.Tensor) -> "Rounding":
        """Return the errors from the norms that were computed while candidates were read.

        Args:
            store: the name of the store.
            coding: the coding of its rows.
            errors: the squared norms of the errors, summed over all ranks: (n,), float64.
            gram: the Gram matrix, whose diagonal has the squared norms of the deltas: (G, n + 1, n + 1), float64.
        """
        squares = gram.diagonal(dim1=1, dim2=2)[:, :-1].sum(0)
        relative = torch.where(squares > 0, (errors / squares).sqrt(), 0.0)
        return cls(store, "center" if coding.relative_to_center else "increments", tuple(relative.tolist()))

    def __str__(self) -> str:
        n = len(self.errors)
        return (
            f"{self.store}, coding {self.coding}: live weights are averages of rounded candidates, with a mean "
            f"error of {sum(self.errors) / n:.3g} of their deltas ({min(self.errors):.3g} to "
            f"{max(self.errors):.3g}); `twa-scale export` merges the exact ones."
        )


def choose_coding(
    config: TwaConfig,
    weights: Sequence[float],
    group: Ranks,
    device: torch.device,
    candidates: Sequence[Candidate],
    names: Sequence[str],
) -> Coding:
    """Return the coding of `config`; for `auto`, the one with the smaller errors in a sample. Collective.

    The sample consists of blocks at equal distances in the trained weights, and does not depend on the number of
    ranks. Each rank encodes some of them with both codings. They are not counted in `bytes_read`.

    Args:
        config: the settings `store` and `coding`.
        weights: the weights of the center, (n,).
        group: all ranks.
        device: the device of the model, for the sum over ranks.
        candidates: the candidates, which have the same tensors.
        names: the names of the trained tensors in the candidates.

    Raises:
        CandidateError: a file cannot be read; on every rank.
    """
    deltas, increments, bits = of_deltas(len(weights)), of_increments(weights), bits_of(config.store)
    if bits is None or config.coding != "auto":
        return increments if bits is not None and config.coding == "increments" else deltas
    # On a CPU, use the kernels of the store. On a GPU, avoid compiling CPU kernels only for the sample.
    as_named = device.type == "cpu" and config.kernels != "torch"
    kernels = choose_kernels("auto" if as_named else "torch", torch.device("cpu"))
    codings = (deltas, increments)
    squares = torch.zeros(len(codings), dtype=torch.float64)
    with group.agree():
        values = _sample(candidates, names, group.rank, group.size)
        for k, coding in enumerate(codings):
            squares[k] = _error(kernels, values, weights, coding, bits)
    # The sum has the same bits on every rank. With NaN, the choice does not matter, because loading raises an error.
    squares = group.sum_(squares.to(device))
    return increments if squares[1] < squares[0] else deltas


def _error(kernels: Kernels, values: torch.Tensor, weights: Sequence[float], coding: Coding, bits: int) -> float:
    """Return the sum of the squared errors of all candidates."""
    n, m = values.shape
    errors = torch.zeros(n, dtype=torch.float64)
    rows = Packed.empty(n, m, 0, bits, values.device)
    kernels.make_deltas(values, weights, Target(rows, coding=coding, errors=errors), 0)
    return float(errors.sum())


def _sample(candidates: Sequence[Candidate], names: Sequence[str], rank: int, ranks: int) -> torch.Tensor:
    """Return this rank's part of the sample of all candidates, (n, elements), float32."""
    n = len(candidates)
    count = max(min(_SAMPLES, _SAMPLED_BYTES // (4 * n * _SAMPLE)), 1)
    samples = [sample for i, sample in enumerate(_sample_spans(candidates[0], names, count)) if i % ranks == rank]
    values = torch.zeros(n, len(samples) * _SAMPLE)

    def read(i: int) -> None:
        candidate, before = candidates[i], candidates[i].bytes_read
        for k, (name, start, length) in enumerate(samples):
            part = torch.empty(length, dtype=candidate.dtype(name))
            candidate.read(name, start, part)
            values[i, k * _SAMPLE :][:length] = part
        candidate.bytes_read = before

    with ThreadPoolExecutor(_THREADS, "twa-scale-sample") as pool:
        list(pool.map(read, range(n)))
    return values


def _sample_spans(candidate: Candidate, names: Sequence[str], count: int) -> Iterator[tuple[str, int, int]]:
    """Yield name, first element and length of about `count` blocks at equal distances in the tensors."""
    sizes = [prod(candidate.shape(name)) for name in names]
    ends = list(accumulate(sizes))
    total = ends[-1] if ends else 0
    step, at, done = max(total // count, _SAMPLE), 0, set[tuple[str, int]]()
    for name, size, end in zip(names, sizes, ends, strict=True):
        while at < end:
            start = (at - (end - size)) // _SAMPLE * _SAMPLE
            if (name, start) not in done:
                done.add((name, start))
                yield name, start, min(_SAMPLE, size - start)
            at += step
