"""Read the candidates once: load trained tensors into the store, and the others into the model."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain

import torch

from twa_scale.average.bases import basis_class
from twa_scale.average.basis import Gram
from twa_scale.average.layout import Layout, alias_jobs
from twa_scale.base.spans import Span, whole_tensor
from twa_scale.candidates import Candidate
from twa_scale.candidates.buffers import buffer_source, own_buffers
from twa_scale.candidates.fingerprint import Fingerprint, fingerprint_of
from twa_scale.candidates.proxy import stored_once
from twa_scale.candidates.read_ahead import Progress, job_bytes
from twa_scale.candidates.streaming import Stream
from twa_scale.config import TwaConfig
from twa_scale.engines import Engine
from twa_scale.kernels import Target
from twa_scale.store import Store


@dataclass(frozen=True)
class LoadedCandidates:
    """The results of reading the candidates on this rank."""

    gram: torch.Tensor
    """Inner products of the deltas and the center of local spans: (G, n + 1, n + 1), float64."""
    errors: torch.Tensor
    """Squared norms of the rounding errors of a packed store: (n,), float64."""
    checksums: dict[str, torch.Tensor]
    """Checksums of the local part of each tensor, by its name in the candidates: (n,), int64."""
    buffers: dict[str, torch.Tensor]
    """Values of buffers, on the first rank."""
    differing: dict[str, int]
    """The copied tensors that differ between candidates, with the index of the candidate from which they are copied."""


def load_candidates(
    engine: Engine,
    layout: Layout,
    candidates: Sequence[Candidate],
    weights: Sequence[float],
    config: TwaConfig,
    store: Store,
    progress: Progress | None,
) -> LoadedCandidates:
    """Read this rank's spans of all candidates, each byte once. Not collective.

    Args:
        engine: the model; its fixed parameters are written.
        layout: maps tensors of the model to those of the candidates.
        candidates: checked to have the same tensors.
        weights: the weights of the center, n numbers.
        config: how to average buffers and read files.
        store: receives deltas and center of the trained spans.
        progress: called with the number of bytes just read and the total.

    Raises:
        CandidateError: a file cannot be read, or a value is not finite.
    """
    stream = Stream(
        candidates,
        store.kernels,
        total=_bytes_to_read(engine, layout, candidates),
        progress=progress,
        read_chunk=config.read_chunk,
        reads_in_flight=config.reads_in_flight,
    )
    gram = Gram(len(layout.groups), len(candidates), store.device, diagonal=basis_class(config.basis).norms_only)
    errors = torch.zeros(len(candidates), dtype=torch.float64, device=store.device)
    _read_spans(engine, layout, stream, weights, store, gram, errors)
    _read_aliases(engine, layout, stream, candidates)
    is_first = engine.shard_group.rank == 0
    buffers = _read_buffers(engine, layout, stream, config.buffers, weights) if is_first else {}
    return LoadedCandidates(
        gram.values.to(engine.device), errors.to(engine.device), stream.checksums, buffers, stream.differing
    )


def fingerprint(
    engine: Engine, layout: Layout, candidates: Sequence[Candidate], loaded: LoadedCandidates
) -> Fingerprint:
    """Return the fingerprint of the candidates, summed over ranks. Collective over the shard group."""
    names = [
        stored for name in (*engine.parameters, *layout.buffers) for stored in layout.names_in_candidates.get(name, ())
    ]
    shapes = {name: candidates[0].shape(name) for name in names}
    local = fingerprint_of([candidate.label for candidate in candidates], shapes, loaded.checksums)
    sums = engine.shard_group.sum_(local.checksums.to(engine.device))
    return replace(local, checksums=sums.cpu())


def write_rest(engine: Engine, layout: Layout, loaded: LoadedCandidates) -> None:
    """Publish the fixed parameters, and copy the buffers of the first rank to all ranks. Collective."""
    engine.publish(set(layout.fixed))
    live = engine.buffers()
    for name, value in engine.shard_group.broadcast(loaded.buffers).items():
        live[name].copy_(value.view(live[name].shape))


def _bytes_to_read(engine: Engine, layout: Layout, candidates: Sequence[Candidate]) -> int:
    spans = [layout.in_candidates(span) for span in layout.read(engine.spans())]
    if engine.shard_group.rank == 0:
        live = _live_buffers(engine, layout)
        spans += [whole_tensor(layout.source(name), tuple(buffer.shape)) for name, buffer in live.items()]
    aliases = job_bytes(candidates, alias_jobs(engine.spans(), layout, candidates))
    return aliases + job_bytes(candidates, [(span, range(len(candidates))) for span in spans])


def _read_spans(
    engine: Engine,
    layout: Layout,
    stream: Stream,
    weights: Sequence[float],
    store: Store,
    gram: Gram,
    errors: torch.Tensor,
) -> None:
    """Read the trained spans of this rank into the store, and the others into the model.

    The squared norms of the rounding errors of a packed store are added to `errors`, (n,).
    """
    live = {layout.in_candidates(span): span for span in layout.read(engine.spans())}
    copied_names = own_buffers({name for names in layout.names_in_candidates.values() for name in names})
    targets: dict[Span, Target] = {}
    sums: list[Span] = []
    copied: dict[Span, int] = {}
    for read, span in live.items():
        if span.name in layout.group_of:
            products = gram.of(layout.group(span))
            targets[read] = replace(store.reserve(span), products=products, errors=errors)
        elif span.name in layout.summed:
            sums.append(read)
        elif engine.parameters[span.name].dtype.is_floating_point and read.name not in copied_names:
            targets[read] = Target(center=engine.live(span))
        else:
            copied[read] = len(weights) - 1
    stream.make_deltas(targets, weights)
    for read, start, values in chain(stream.copies(copied), stream.sums(sums)):
        engine.live(live[read])[start : start + len(values)] = values


def _read_buffers(
    engine: Engine, layout: Layout, stream: Stream, buffers: str | int, weights: Sequence[float]
) -> dict[str, torch.Tensor]:
    """Read the buffers that the candidates have: average statistics according to `buffers`, and copy the others."""
    live, last = _live_buffers(engine, layout), len(weights) - 1
    values = {name: torch.empty(buffer.numel(), dtype=buffer.dtype) for name, buffer in live.items()}
    spans = {whole_tensor(layout.source(name), tuple(buffer.shape)): name for name, buffer in live.items()}
    sources = {
        span: buffer_source(name, buffers, weights) if live[name].is_floating_point() else last
        for span, name in spans.items()
    }
    averaged = {span: source for span, source in sources.items() if not isinstance(source, int)}
    statistics = {span: Target(center=values[spans[span]]) for span in averaged}
    stream.make_deltas(statistics, next(iter(averaged.values()), weights))  # all use the same weights
    for span, start, part in stream.copies({s: source for s, source in sources.items() if isinstance(source, int)}):
        values[spans[span]][start : start + len(part)] = part
    return values


def _read_aliases(engine: Engine, layout: Layout, stream: Stream, candidates: Sequence[Candidate]) -> None:
    """Compute the checksums of tied parameters under their other names; tensors stored once are not read again."""
    stream.check(alias_jobs(engine.spans(), layout, candidates))
    sums = stream.checksums
    for source, *aliases in layout.names_in_candidates.values():
        for alias in aliases if source in sums else ():
            alias_sums = sums.setdefault(alias, torch.zeros_like(sums[source]))
            for i, candidate in enumerate(candidates):
                if stored_once(candidate, source, alias):
                    alias_sums[i] = sums[source][i]


def _live_buffers(engine: Engine, layout: Layout) -> dict[str, torch.Tensor]:
    return {name: buffer for name, buffer in engine.buffers().items() if name in layout.buffers}
