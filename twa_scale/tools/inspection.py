"""The contents of candidates and their distances and angles, from one streamed pass; the output of `inspect`."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from rich.markup import escape
from rich.table import Table

from twa_scale.average.basis import Gram
from twa_scale.base.spans import share, whole_tensor
from twa_scale.candidates import Candidate, Wanted, open_together
from twa_scale.candidates.adapters import Concatenated, described, factors_in, products_gram
from twa_scale.candidates.dtypes import stored_dtype
from twa_scale.candidates.read_ahead import Progress, job_bytes
from twa_scale.candidates.streaming import Stream
from twa_scale.config import SelectConfig
from twa_scale.kernels import Target, choose_kernels
from twa_scale.ranks import Group


@dataclass(frozen=True)
class Inspection:
    """The results for n candidates. Deltas are relative to their mean, over all floating point tensors."""

    labels: list[str]
    tensors: list[int]
    elements: list[int]
    dtypes: list[str]
    norms: list[float]
    """||w_i||."""
    delta_norms: list[float]
    """||delta_i||."""
    cosines: npt.NDArray[np.float64]
    """(n, n): the cosine of delta_i and delta_j; NaN if one of them is zero."""
    distances: npt.NDArray[np.float64]
    """(n, n): ||w_i - w_j||."""
    adapters: list[str | None]
    """The kind, ranks and scalings of each candidate that is an adapter of PEFT; None for others."""


def inspect(
    paths: str | Sequence[str | Path],
    progress: Progress | None = None,
    wanted: Wanted | None = None,
    select: SelectConfig | None = None,
) -> Inspection:
    """Read every byte of the candidates once, in bounded memory. Collective: the ranks of a launcher share the work.

    For LoRA adapters in the space of products (`Wanted.space`), the products s B A are compared instead of the factors.

    Raises:
        CandidateError: a candidate is damaged, has other tensors than the others, or has NaN or Inf.
    """
    group = Group.world()
    candidates = open_together(paths if isinstance(paths, str) else list(paths), group, 1, wanted or Wanted(), select)
    n = len(candidates)
    adapters = [candidate for candidate in candidates if isinstance(candidate, Concatenated)]
    factors = list(factors_in(candidates[0].names()).values()) if adapters else []
    in_products = {name for factor in factors for name in (factor.a, factor.b)}
    names = [
        name
        for name in candidates[0].names()
        if candidates[0].dtype(name).is_floating_point and name not in in_products
    ]
    device = torch.device("cpu")
    gram = Gram(1, n, device)
    tensors = [whole_tensor(name, candidates[0].shape(name)) for name in names]
    spans = [tensor.part(*share(len(tensor), group.rank, group.size)) for tensor in tensors]
    total = job_bytes(candidates, [(span, range(n)) for span in spans])
    stream = Stream(candidates, choose_kernels("auto", device), total=total, progress=progress)
    with group.agree():
        stream.make_deltas({span: Target(products=gram.of(0)) for span in spans}, [1 / n] * n)
        if adapters:
            gram.values[0] += _around_mean(products_gram(adapters, factors[group.rank :: group.size]))
    products = group.sum_(gram.values)[0].numpy()
    deltas, center = products[:n, :n], products[n]
    squares = np.diag(deltas)
    lengths = np.sqrt(squares)
    with np.errstate(invalid="ignore", divide="ignore"):
        cosines = deltas / lengths[:, None] / lengths[None, :]
    return Inspection(
        labels=[candidate.label for candidate in candidates],
        tensors=[len(candidate.names()) for candidate in candidates],
        elements=[sum(prod(c.shape(name)) for name in c.names()) for c in map(_as_stored, candidates)],
        dtypes=[
            _dtypes(Counter(str(stored_dtype(c, name)).removeprefix("torch.") for name in c.names()))
            for c in candidates
        ],
        norms=np.sqrt(squares + 2 * center[:n] + center[n]).tolist(),
        delta_norms=lengths.tolist(),
        cosines=cosines,
        distances=np.sqrt(np.maximum(squares[:, None] + squares[None, :] - 2 * deltas, 0)),
        adapters=[described(candidate) for candidate in candidates],
    )


def _around_mean(products: torch.Tensor) -> torch.Tensor:
    """Return the inner products of the deltas and the mean, (n + 1, n + 1), from the inner products of the w_i."""
    n = len(products)
    mean = torch.full((1, n), 1 / n, dtype=torch.float64)
    rows = torch.cat([torch.eye(n, dtype=torch.float64) - mean, mean])
    return rows @ products @ rows.T


def _as_stored(candidate: Candidate) -> Candidate:
    return candidate.adapter if isinstance(candidate, Concatenated) else candidate


def _dtypes(counts: Counter[str]) -> str:
    return ", ".join(name for name, _ in counts.most_common())


def inspection_json(inspection: Inspection) -> str:
    """Return the results as JSON. A cosine with a delta of zero norm is null."""
    plain = asdict(inspection)
    cosines = [[None if value != value else value for value in row] for row in inspection.cosines.tolist()]
    return json.dumps({**plain, "cosines": cosines, "distances": inspection.distances.tolist()}, indent=2)


def inspection_table(inspection: Inspection) -> Table:
    """Return a table with one row for each candidate."""
    table = Table(caption="delta: to the mean of these candidates; cosine: of a delta and the one above")
    with_adapters = any(inspection.adapters)
    table.add_column("candidate", overflow="fold")
    for column in ("tensors", "elements", "dtype", "norm", "delta", "cosine"):
        table.add_column(column, justify="left" if column == "dtype" else "right", no_wrap=column != "dtype")
    if with_adapters:
        table.add_column("adapter", overflow="fold")
    for i, label in enumerate(inspection.labels):
        table.add_row(
            escape(Path(label).name),
            f"{inspection.tensors[i]:,}",
            f"{inspection.elements[i]:,}",
            inspection.dtypes[i],
            f"{inspection.norms[i]:.4g}",
            f"{inspection.delta_norms[i]:.4g}",
            f"{inspection.cosines[i, i - 1]:+.3f}" if i else "",
            *([inspection.adapters[i] or ""] if with_adapters else []),
        )
    return table
