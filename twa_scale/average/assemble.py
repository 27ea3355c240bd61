"""Make the average from loaded candidates: their fingerprint, the basis, and notices about them."""

from collections.abc import Sequence

import torch

from twa_scale.average.average import TrainableAverage
from twa_scale.average.bases import make_basis
from twa_scale.average.basis import Basis
from twa_scale.average.grouping import experts_line, unequal_line
from twa_scale.average.layout import Layout
from twa_scale.average.load_candidates import LoadedCandidates, fingerprint, write_rest
from twa_scale.average.parts import Parts
from twa_scale.average.rows import make_rows
from twa_scale.base.names import quoted
from twa_scale.base.notices import notice
from twa_scale.candidates.buffers import copied_notice
from twa_scale.candidates.find import copies
from twa_scale.candidates.fingerprint import Fingerprint
from twa_scale.candidates.rounding import Rounding
from twa_scale.config import TwaConfig
from twa_scale.engines.model_checks import enclosing_wrapper
from twa_scale.errors import CandidateError
from twa_scale.ranks import Pods
from twa_scale.store import Store, bits_of


def assemble(parts: Parts, loaded: LoadedCandidates, weights: Sequence[float]) -> TrainableAverage:
    """Return the average of candidates that are in the store, and write its first weights. Collective.

    Args:
        parts: the settings, the model, the ranks and the candidates.
        loaded: what was computed while the candidates were read.
        weights: the weights of the center, n numbers.

    Raises:
        CandidateError, ConfigError: on every rank.
    """
    config, engine, pods, layout, store = parts.config, parts.engine, parts.pods, parts.layout, parts.store
    result = fingerprint(engine, layout, parts.candidates, loaded)
    result.require_same_in(pods)
    gram = pods.sum_(loaded.gram.mul_(pods.share))  # equal in pods only up to rounding, which would make them diverge
    rounding = _rounding(config, pods, store, loaded.errors, gram)
    with pods.agree():
        _require_equal_ties(layout, result)
    write_rest(engine, layout, loaded)
    _report(parts, result, loaded)
    basis = _basis(pods, config, gram.cpu(), weights)  # small matrices, which a CPU handles faster than a GPU
    rows = make_rows(config, engine, pods, parts.reduction, layout, basis, store.coding)
    return TrainableAverage(parts, basis, rows, result, rounding)


def _report(parts: Parts, fingerprint: Fingerprint, loaded: LoadedCandidates) -> None:
    """Report on one rank settings that may be unintended. Collective, because warnings may be turned into errors."""
    config, engine, pods, layout = parts.config, parts.engine, parts.pods, parts.layout
    copied = {name: i for differing in engine.shard_group.gather(loaded.differing) for name, i in differing.items()}
    with pods.agree():
        if pods.rank != 0:
            return
        _warn_of_equals(layout, fingerprint)
        _report_fixed_tensors(layout)
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
        if text := copied_notice(copied, fingerprint.labels):
            notice(text)


def _report_fixed_tensors(layout: Layout) -> None:
    if layout.kept:
        notice(
            f"{len(layout.kept)} tensors of the model ({quoted(layout.kept, 2)}) are in no candidate, and keep the "
            "value that the model has (`missing`). Exports hold what the candidates hold, so they lack these "
            "tensors, and from_pretrained of an export initializes them again: copy them from this model."
        )
    if layout.base:
        notice(
            f"the base model keeps its {len(layout.base)} tensors ({quoted(layout.base, 2)}): candidates and exports "
            "are adapters."
        )


def _require_equal_ties(layout: Layout, fingerprint: Fingerprint) -> None:
    """Refuse candidates that hold different values under the names of one tied tensor of the model.

    Raises:
        CandidateError: naming the first candidate and both tensors.
    """
    sums = dict(zip(fingerprint.shapes, fingerprint.checksums.T.tolist(), strict=True))
    for source, *aliases in layout.names_in_candidates.values():
        for alias in aliases:
            for label, first, second in zip(fingerprint.labels, sums[source], sums[alias], strict=True):
                if first != second:
                    raise CandidateError(
                        f"{label}: tensors {source!r} and {alias!r} hold different values, but the model ties them: "
                        "they are one parameter, which can have one value only. Untie them in the model, or name one "
                        "of them in `ignore`."
                    )


def _warn_of_equals(layout: Layout, fingerprint: Fingerprint) -> None:
    # The A of products have no coefficients, but candidates may differ only in them.
    averaged = {layout.source(name) for name in (*layout.group_of, *layout.summed)}
    for equal in copies(fingerprint.labels, fingerprint.checksums_of(averaged)):
        notice(f"candidates {equal} have the same checksum in every tensor: one of them is enough.")


def _rounding(config: TwaConfig, pods: Pods, store: Store, errors: torch.Tensor, gram: torch.Tensor) -> Rounding | None:
    """Return the rounding errors of a packed store, None for other stores. Collective.

    Args:
        config: names the store.
        pods: all ranks.
        store: holds the candidates.
        errors: the squared norms of this rank's errors, (n,).
        gram: the Gram matrices of all ranks, (G, n + 1, n + 1).
    """
    if bits_of(config.store) is None:
        return None
    total = pods.sum_(errors.mul_(pods.share))
    return Rounding.measured(config.store, store.coding, total.cpu(), gram.cpu())


def _basis(pods: Pods, config: TwaConfig, gram: torch.Tensor, weights: Sequence[float]) -> Basis:
    """Return the basis of the first rank on all ranks, because other processors may round differently. Collective."""
    basis = None
    with pods.agree():
        if pods.rank == 0:
            basis = make_basis(config, gram, weights)
    basis = pods.broadcast(basis)
    assert basis is not None
    return basis
