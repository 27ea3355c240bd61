"""From what was read of the candidates to the average: fingerprint, basis, and what has to be said."""

from collections.abc import Sequence

import torch

from twa_scale.average.average import TrainableAverage
from twa_scale.average.bases import make_basis
from twa_scale.average.basis import Basis
from twa_scale.average.grouping import experts_line, unequal_line
from twa_scale.average.layout import Layout
from twa_scale.average.load_candidates import LoadedCandidates, fingerprint, write_rest
from twa_scale.average.rows import make_rows
from twa_scale.base.names import some
from twa_scale.base.notices import notice
from twa_scale.candidates import Candidate
from twa_scale.candidates.buffers import copied_notice
from twa_scale.candidates.carry_over import CarriedFiles
from twa_scale.candidates.find import same_files
from twa_scale.candidates.fingerprint import Fingerprint
from twa_scale.candidates.rounding import Rounding
from twa_scale.config import TwaConfig
from twa_scale.engines import Engine
from twa_scale.engines.model_checks import enclosing_wrapper
from twa_scale.errors import CandidateError
from twa_scale.ranks import Pods, Reduction
from twa_scale.store import Store, bits_of


def assemble(
    config: TwaConfig,
    engine: Engine,
    pods: Pods,
    reduction: Reduction,
    layout: Layout,
    store: Store,
    filled: LoadedCandidates,
    candidates: Sequence[Candidate],
    carried: CarriedFiles,
    weights: Sequence[float],
) -> TrainableAverage:
    """Return the average of candidates that are in the store, and write its first weights. Collective.

    Args:
        config: its settings.
        engine: the model.
        pods: all ranks.
        reduction: sums coefficient gradients over them.
        layout: which tensors are trained.
        store: holds the deltas.
        filled: what was found on the way there.
        candidates: give names, types and labels.
        carried: what exports take over from them.
        weights: of the center.

    Raises:
        CandidateError, ConfigError: on every rank.
    """
    found = fingerprint(engine, layout, candidates, filled)
    found.require_same_in(pods)
    gram = pods.sum_(filled.gram.mul_(pods.share))  # all pods have the same but for rounding, which would part them
    rounding = _rounding(config, pods, store, filled.errors, gram)
    with pods.agree():
        _require_equal_ties(layout, found)
    write_rest(engine, layout, filled)
    _report(config, engine, pods, layout, found, filled)
    basis = _basis(pods, config, gram.cpu(), weights)  # small mathematics: a GPU would only wait for it
    rows = make_rows(config, engine, pods, reduction, layout, basis, store.coding)
    return TrainableAverage(
        config, engine, pods, reduction, layout, store, basis, rows, found, candidates, carried, rounding
    )


def _report(
    config: TwaConfig, engine: Engine, pods: Pods, layout: Layout, found: Fingerprint, filled: LoadedCandidates
) -> None:
    """Say on one rank what a user may not have meant. Collective: a warning may be an error."""
    copied = {name: i for differing in engine.shard_group.gather(filled.differing) for name, i in differing.items()}
    with pods.agree():
        if pods.rank != 0:
            return
        _warn_of_equals(layout, found)
        if layout.kept:
            notice(
                f"{len(layout.kept)} tensors of the model ({some(layout.kept, 2)}) are in no candidate, and keep the "
                "value that the model has (`missing`). Exports hold what the candidates hold, so they lack these "
                "tensors, and from_pretrained of an export initializes them anew: copy them from this model."
            )
        if layout.base:
            notice(
                f"the base model keeps its {len(layout.base)} tensors ({some(layout.base, 2)}): candidates and exports "
                "are adapters."
            )
        if config.groups == "expert":
            notice(experts_line(layout.groups, layout.group_of, layout.experts))
            shapes = {name: engine.parameters[name].shape for name in layout.group_of}
            if text := unequal_line(shapes, layout.experts):
                notice(text)
        if wrapper := enclosing_wrapper(engine):
            notice(
                f"attached to a plain module that a {wrapper} wraps: every rank holds the whole average, and "
                f"the wrapper's own averaging of gradients is wasted. Attach to the {wrapper}."
            )
        if text := copied_notice(copied, found.labels):
            notice(text)


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
    # The A of products are no part of the average's coefficients, but candidates may differ in them alone.
    averaged = {layout.source(name) for name in (*layout.group_of, *layout.summed)}
    for first, second in fingerprint.equals(averaged):
        if same_files(first, second):  # reported when they were found
            continue
        notice(
            f"candidates {first} and {second} have the same checksum in every tensor: of two with the same weights the "
            "second adds nothing."
        )


def _rounding(config: TwaConfig, pods: Pods, store: Store, errors: torch.Tensor, gram: torch.Tensor) -> Rounding | None:
    """Return what a packed store makes of the candidates. Collective.

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
    return Rounding.measured(config.store, store.coding, total.cpu(), gram.cpu())


def _basis(pods: Pods, config: TwaConfig, gram: torch.Tensor, weights: Sequence[float]) -> Basis:
    """Return the basis that the first rank has made: processors of another kind round otherwise."""
    basis = None
    with pods.agree():
        if pods.rank == 0:
            basis = make_basis(config, gram, weights)
    basis = pods.broadcast(basis)
    assert basis is not None
    return basis
