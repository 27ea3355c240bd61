"""Attaching to a model: match, stream the candidates into the store once, choose the basis, write the first weights."""

import logging
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from twa_scale.average import TrainableAverage
from twa_scale.basis import Basis, Gram, make_basis, needs_norms_only
from twa_scale.buffers import buffer_source, copied_notice, spectral_vectors
from twa_scale.config import TwaConfig, block_settings, center_weights, validated
from twa_scale.engines import Engine, choose_engine
from twa_scale.engines.misplaced import require_device, require_memory, wrapper_beside
from twa_scale.engines.pairs import complex_in_model
from twa_scale.errors import CandidateError, ConfigError
from twa_scale.kernels import Target
from twa_scale.layout import Layout, alias_jobs, match, require_same_kinds, wanted_of
from twa_scale.notices import notice
from twa_scale.optimizer import check_optimizer, check_settings
from twa_scale.ranks import Pods, Reduction, require_same_settings
from twa_scale.reading import Progress, job_bytes
from twa_scale.rounding import Rounding, choose_coding
from twa_scale.sources import Candidate, open_together
from twa_scale.sources.carried import carry
from twa_scale.sources.find import same_files
from twa_scale.sources.mapped import mapped, refuse_overlap
from twa_scale.sources.pairs import complex_in_files
from twa_scale.sources.wrapped import stored_once
from twa_scale.spans import whole
from twa_scale.state import Fingerprint, fingerprint_of
from twa_scale.store import Store, bits_of, make_store
from twa_scale.streaming import Stream

Candidates = str | Sequence[str | Path] | Sequence[Mapping[str, torch.Tensor]]


def attach(
    model: nn.Module | Engine,
    candidates: Candidates | None = None,
    config: TwaConfig | dict[str, Any] | None = None,
    *,
    replica_group: dist.ProcessGroup | None = None,
    progress: Progress | None = None,
) -> TrainableAverage:
    """Put a trainable average of `candidates` into `model`, whatever shards it. Collective.

    The weights that the model has are overwritten; each rank reads only the spans that it holds. The model stays
    yours: run forward and backward as before, then `step()` in place of your optimizer's. A plain module on several
    ranks of a process group is a replica: every rank calls this, holds everything, and sees its own data.

    Args:
        model: a plain module, DistributedDataParallel, a module sharded by `fully_shard`, a DeepSpeedEngine, or
            another kind that docs/engines.md lists; or an `Engine` of your own.
        candidates: a glob, a list of paths, or a list of state dicts, in training order. A DeepSpeedEngine may
            have them in its JSON, with the settings: `"twa": {"candidates": ..}`.
        config: a `TwaConfig`, or a dict of its fields; where it is not given, the fields in DeepSpeed's JSON.
        replica_group: with pods, the first rank of every pod; or each rank's own counterparts, as `get_group("pods")`
            of a 2-D mesh. Pods are shard groups that see different data and exchange only coefficient gradients, which
            count by rank. A plain module's pod is one rank; its replica group is all ranks unless given here.
        progress: called on every rank with the number of bytes that it has just read, and of those that it will read.

    Raises:
        ConfigError, CandidateError, EngineError: on every rank, also when only one of them finds the fault.
    """
    engine = choose_engine(model, replica_group)
    group = engine.shard_group
    pods = Pods(group, engine.replica_group)
    with pods.agree():
        require_memory(engine)
        require_device(engine)
        engine.check()
        found, fields = block_settings(engine.settings())
        config = validated(TwaConfig, fields if config is None else config)
        check_optimizer(config)
        candidates = found if candidates is None else candidates
        if candidates is None:
            raise ConfigError('candidates: give them to attach, or as "twa": {"candidates": ..} in DeepSpeed\'s JSON.')
        if config.max_weight_grad_norm is not None and pods.count > 1 and not engine.averages_replicas:
            raise ConfigError(
                "max_weight_grad_norm: needs the norm of the mean gradient over all data, and these replicas exchange "
                "gradients of the coefficients only. Wrap the model in DistributedDataParallel or shard it over all "
                "ranks, or set max_grad_norm, which clips the gradient of the coefficients."
            )
        if config.combine == "forward":
            engine.units()  # may refuse: better now than when all is read
    require_same_settings(pods, config.model_dump(mode="json", include=set(TwaConfig.model_fields)))
    with ExitStack() as undo:  # a caller who mends the fault and comes again finds nothing taken
        reduction = Reduction(config.comm, pods, group, engine.replica_group)
        undo.callback(reduction.close)
        opened = open_together(candidates, pods, wanted=wanted_of(engine.parameters, engine.buffers(), config))
        for candidate in opened:
            undo.callback(candidate.close)
        with pods.agree():
            carried = carry(opened, files=pods.rank == 0, code=config.carry_code)
            layout = match(engine.parameters, engine.buffers(), opened, config)
            types = {name: buffer.dtype for name, buffer in engine.buffers().items()}
            types |= {name: info.dtype for name, info in engine.parameters.items()}
            require_same_kinds(layout, types, complex_in_model(engine), opened[0], complex_in_files(opened[0]))
            weights = center_weights(config.center, len(opened))
            check_settings(config, weights)
        sources = [layout.source(name) for name in layout.group_of]
        coding = choose_coding(config, weights, pods, engine.device, opened, sources)
        with pods.agree():
            if config.store == "mapped":
                live = [engine.live(span) for span in engine.spans() if span.name in layout.group_of]
                refuse_overlap(opened, [layout.source(name) for name in layout.group_of], live)
            store = make_store(
                config,
                len(opened),
                engine.device,
                lambda name: [mapped(candidate, layout.source(name)) for candidate in opened],
                coding,
            )
            undo.callback(store.close)
            stream = Stream(
                opened,
                store.kernels,
                total=_bytes_to_read(engine, layout, opened),
                progress=progress,
                read_chunk=config.read_chunk,
                reads_in_flight=config.reads_in_flight,
            )
            norms_only = needs_norms_only(config.basis)
            gram = Gram(len(layout.groups), len(opened), store.device, diagonal=norms_only)
            errors = torch.zeros(len(opened), dtype=torch.float64, device=store.device)
            _read_spans(engine, layout, stream, weights, store, gram, errors)
            _read_aliases(engine, layout, stream, opened)
            buffers = _read_buffers(engine, layout, stream, config.buffers, weights) if group.rank == 0 else {}
        fingerprint = _fingerprint(engine, layout, opened, stream)
        fingerprint.require_same_in(pods)
        inner = gram.values.to(engine.device).mul_(pods.share)
        pods.sum_(inner)  # all pods have the same but for rounding, which would part their bases
        rounding = _rounding(config, pods, store, errors.to(engine.device), inner)
        with pods.agree():
            _require_equal_ties(layout, fingerprint)
        _write_rest(engine, layout, buffers)
        copied = {name: i for found in group.gather(stream.differing) for name, i in found.items()}
        with pods.agree():  # a warning may be an error
            if pods.rank == 0:
                _warn_of_equals(layout, fingerprint)
                if wrapper := wrapper_beside(engine):
                    notice(
                        f"attached to a plain module that a {wrapper} wraps: every rank holds the whole average, and "
                        f"the wrapper's own averaging of gradients is wasted. Attach to the {wrapper}."
                    )
                if copied:
                    notice(copied_notice(copied, fingerprint.labels))
        basis = _basis(pods, config, inner.cpu(), weights)  # small mathematics: a GPU would only wait for it
        average = TrainableAverage(
            config, engine, pods, reduction, layout, store, basis, fingerprint, opened, carried, rounding
        )
        undo.pop_all()
    return average


def _rounding(config: TwaConfig, pods: Pods, store: Store, errors: torch.Tensor, gram: torch.Tensor) -> Rounding | None:
    """Return what a packed store makes of the candidates, and log it on the first rank. Collective.

    Args:
        config: names the store.
        pods: all ranks.
        store: the one that was filled.
        errors: of this rank.
        gram: of all ranks.
    """
    if bits_of(config.store) is None:
        return None
    total = pods.sum_(errors.mul_(pods.share))
    rounding = Rounding.measured(config.store, store.coding, total.cpu(), gram.cpu())
    if pods.rank == 0:
        logging.getLogger("twa_scale").info("%s", rounding)
    return rounding


def _basis(pods: Pods, config: TwaConfig, gram: torch.Tensor, weights: Sequence[float]) -> Basis:
    """Return the basis that the first rank has made: processors of another kind round otherwise."""
    basis = None
    with pods.agree():
        if pods.rank == 0:
            basis = make_basis(
                config.basis,
                gram,
                torch.tensor(weights, dtype=torch.float64),
                units=config.units,
                num_components=config.num_components,
            )
    basis = pods.broadcast(basis)
    assert basis is not None
    return basis


def _bytes_to_read(engine: Engine, layout: Layout, candidates: Sequence[Candidate]) -> int:
    spans = [layout.sourced(span) for span in engine.spans()]
    if engine.shard_group.rank == 0:
        live = _live_buffers(engine, layout)
        spans += [whole(layout.source(name), tuple(buffer.shape)) for name, buffer in live.items()]
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
    """Stream this rank's spans: those that are trained into the store, the others at once into the model.

    The squared norms of what a packed store is off by are added to `errors`, (n,).
    """
    live = {layout.sourced(span): span for span in engine.spans()}
    vectors = spectral_vectors({name for held in layout.held_as.values() for name in held})
    targets = {}
    for read, span in live.items():
        if span.name in layout.group_of:
            products = gram.of(layout.group_of[span.name])
            targets[read] = replace(store.reserve(span), products=products, errors=errors)
        elif engine.parameters[span.name].dtype.is_floating_point and read.name not in vectors:
            targets[read] = Target(center=engine.live(span))
    stream.make_deltas(targets, weights)
    for read, start, values in stream.copies({read: len(weights) - 1 for read in live if read not in targets}):
        engine.live(live[read])[start : start + len(values)] = values


def _read_buffers(
    engine: Engine, layout: Layout, stream: Stream, buffers: str | int, weights: Sequence[float]
) -> dict[str, torch.Tensor]:
    """Read every buffer that the candidates hold: statistics averaged as `buffers` says, others from one candidate."""
    live, last = _live_buffers(engine, layout), len(weights) - 1
    values = {name: torch.empty(buffer.numel(), dtype=buffer.dtype) for name, buffer in live.items()}
    spans = {whole(layout.source(name), tuple(buffer.shape)): name for name, buffer in live.items()}
    sources = {
        span: buffer_source(name, buffers, weights) if live[name].is_floating_point() else last
        for span, name in spans.items()
    }
    averaged = {span: source for span, source in sources.items() if not isinstance(source, int)}
    statistics = {span: Target(center=values[spans[span]]) for span in averaged}
    stream.make_deltas(statistics, next(iter(averaged.values()), weights))  # which are the same for all
    for span, start, part in stream.copies({s: source for s, source in sources.items() if isinstance(source, int)}):
        values[spans[span]][start : start + len(part)] = part
    return values


def _read_aliases(engine: Engine, layout: Layout, stream: Stream, candidates: Sequence[Candidate]) -> None:
    """Find the checksums of tied parameters under their other names; what is stored once is not read again."""
    stream.check(alias_jobs(engine.spans(), layout, candidates))
    sums = stream.checksums
    for source, *aliases in layout.held_as.values():
        for alias in aliases if source in sums else ():
            found = sums.setdefault(alias, torch.zeros_like(sums[source]))
            for i, candidate in enumerate(candidates):
                if stored_once(candidate, source, alias):
                    found[i] = sums[source][i]


def _live_buffers(engine: Engine, layout: Layout) -> dict[str, torch.Tensor]:
    return {name: buffer for name, buffer in engine.buffers().items() if name in layout.buffers}


def _fingerprint(engine: Engine, layout: Layout, candidates: Sequence[Candidate], stream: Stream) -> Fingerprint:
    names = [held for name in (*engine.parameters, *layout.buffers) for held in layout.held_as[name]]
    shapes = {name: candidates[0].shape(name) for name in names}
    fingerprint = fingerprint_of([candidate.label for candidate in candidates], shapes, stream.checksums)
    sums = engine.shard_group.sum_(fingerprint.checksums.to(engine.device))
    return replace(fingerprint, checksums=sums.cpu())


def _write_rest(engine: Engine, layout: Layout, buffers: dict[str, torch.Tensor]) -> None:
    """Make the fixed parameters visible and give every rank the buffers that rank 0 has read."""
    engine.publish(set(layout.fixed))
    live = engine.buffers()
    for name, value in engine.shard_group.broadcast(buffers).items():
        live[name].copy_(value.view(live[name].shape))


def _require_equal_ties(layout: Layout, fingerprint: Fingerprint) -> None:
    """Refuse candidates that hold different values under the names of one tied tensor of the model.

    Raises:
        CandidateError: naming the first candidate and both tensors.
    """
    sums = dict(zip(fingerprint.shapes, fingerprint.checksums.T.tolist(), strict=True))
    for source, *aliases in layout.held_as.values():
        for alias in aliases:
            for label, first, second in zip(fingerprint.labels, sums[source], sums[alias], strict=True):
                if first != second:
                    raise CandidateError(
                        f"{label}: tensors {source!r} and {alias!r} hold different values, but the model ties them: "
                        "they are one parameter, which can have one value only. Untie them in the model, or name the "
                        "one that is not meant in `ignore`."
                    )


def _warn_of_equals(layout: Layout, fingerprint: Fingerprint) -> None:
    for first, second in fingerprint.equals({layout.source(name) for name in layout.group_of}):
        if same_files(first, second):  # reported when they were found
            continue
        notice(
            f"candidates {first} and {second} have the same checksum in every tensor: of two with the same weights the "
            "second adds nothing."
        )
