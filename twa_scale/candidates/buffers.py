"""Recognize buffers by their names, because a checkpoint does not record which of its tensors are buffers."""

import re
from collections.abc import Collection, Mapping, Sequence

from twa_scale.base.names import quoted
from twa_scale.config import candidate_index

Source = Sequence[float] | int
"""The source of a buffer: weights of the candidates, or the index of the candidate from which it is copied."""

_STATISTIC = re.compile(r"(^|\.)(running|moving)_(mean|var|variance|std|avg|average)$")
_COUNTER = re.compile(r"(^|\.)num_batches_tracked$")
_PARAMETRIZATION = re.compile(r"^(?P<stem>(.*\.)?parametrizations\.[^.]+)\.\d+\._[uv]$")
_HOOK = re.compile(r"^(?P<stem>.*)_[uv]$")


def is_statistic(name: str) -> bool:
    """Return whether a tensor is a running statistic, as of BatchNorm: `running_mean`, `running_var` and others."""
    return _STATISTIC.search(name) is not None


def spectral_vectors(names: Collection[str]) -> set[str]:
    """Return the vectors u and v of spectral norms, which belong to the weight of one candidate.

    They are recognized by other tensors of the module: `weight_u` with `weight_orig` (`torch.nn.utils.spectral_norm`)
    or `weight_bar`; `parametrizations.weight.0._u` with `parametrizations.weight.original`.
    """
    result = set()
    for name in names:
        if match := _PARAMETRIZATION.match(name):
            neighbors = {f"{match['stem']}.original"}
        elif match := _HOOK.match(name):
            neighbors = {f"{match['stem']}_orig", f"{match['stem']}_bar"}
        else:
            continue
        if not neighbors.isdisjoint(names):
            result.add(name)
    return result


def buffer_source(name: str, buffers: str | int, weights: Sequence[float]) -> Source:
    """Return the source of a floating point buffer.

    Args:
        name: the name of the buffer.
        buffers: the setting: `average` or `mean` for running statistics, or the candidate that gives all buffers.
        weights: the weights of the candidates, for `average`.

    Raises:
        ConfigError: an index is out of range.
    """
    n = len(weights)
    if buffers not in ("average", "mean"):
        return candidate_index(buffers, n, "buffers")
    if not is_statistic(name):
        return n - 1
    return weights if buffers == "average" else [1 / n] * n


def copied_notice(copied: Mapping[str, int], labels: Sequence[str]) -> str | None:
    """Return a notice about tensors that were copied from one candidate although others differ, or None.

    The batch counters of BatchNorm are left out: they always differ, and have no effect on outputs.

    Args:
        copied: the index of the candidate, by tensor.
        labels: the labels of the candidates.
    """
    by_label: dict[str, list[str]] = {}
    for name in sorted(name for name in copied if not _COUNTER.search(name)):
        by_label.setdefault(labels[copied[name]], []).append(name)
    if not by_label:
        return None
    parts = [f"{quoted(names)} from {label}" for label, names in by_label.items()]
    return (
        f"copied, not averaged: {'; '.join(parts)}. The candidates differ in them, but they are integers, or buffers "
        "that are not running statistics."
    )
