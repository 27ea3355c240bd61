"""Recognize buffers by their names, because a checkpoint does not record which of its tensors are buffers."""

import re
from collections.abc import Collection, Mapping, Sequence

from twa_scale.base.names import some
from twa_scale.config import candidate_index

Source = Sequence[float] | int
"""What a tensor is made of: the weights of the candidates, or the index of the one that it is copied from."""

_STATISTIC = re.compile(r"(^|\.)(running|moving)_(mean|var|variance|std|avg|average)$")
_COUNTER = re.compile(r"(^|\.)num_batches_tracked$")
_OF_PARAMETRIZATION = re.compile(r"^(?P<stem>(.*\.)?parametrizations\.[^.]+)\.\d+\._[uv]$")
_OF_HOOK = re.compile(r"^(?P<stem>.*)_[uv]$")


def is_statistic(name: str) -> bool:
    """Whether a tensor is a running statistic, as BatchNorm and InstanceNorm keep: `running_mean`, `running_var`, .."""
    return _STATISTIC.search(name) is not None


def spectral_vectors(names: Collection[str]) -> set[str]:
    """Return the vectors u and v of spectral norms, which belong to the weight of one candidate.

    They are told by what stands beside them: `weight_u` beside `weight_orig` (`torch.nn.utils.spectral_norm`) or
    `weight_bar`; `parametrizations.weight.0._u` beside `parametrizations.weight.original`.
    """
    found = set()
    for name in names:
        if match := _OF_PARAMETRIZATION.match(name):
            beside = {f"{match['stem']}.original"}
        elif match := _OF_HOOK.match(name):
            beside = {f"{match['stem']}_orig", f"{match['stem']}_bar"}
        else:
            continue
        if not beside.isdisjoint(names):
            found.add(name)
    return found


def buffer_source(name: str, buffers: str | int, weights: Sequence[float]) -> Source:
    """Return what a floating point buffer is made of.

    Args:
        name: the buffer.
        buffers: the setting: `average` or `mean` for running statistics, or the candidate that gives all buffers.
        weights: of the candidates, for `average`.

    Raises:
        ConfigError: an index out of range.
    """
    n = len(weights)
    if buffers not in ("average", "mean"):
        return candidate_index(buffers, n, "buffers")
    if not is_statistic(name):
        return n - 1
    return weights if buffers == "average" else [1 / n] * n


def copied_notice(copied: Mapping[str, int], labels: Sequence[str]) -> str | None:
    """Return the line about tensors that were copied from one candidate although others differ, if there are any.

    The batch counters of BatchNorm are left out: they differ in every training, and have no effect on outputs.

    Args:
        copied: the index of the candidate, by tensor.
        labels: of the candidates.
    """
    by_label: dict[str, list[str]] = {}
    for name in sorted(name for name in copied if not _COUNTER.search(name)):
        by_label.setdefault(labels[copied[name]], []).append(name)
    if not by_label:
        return None
    parts = [f"{some(names)} from {label}" for label, names in by_label.items()]
    return (
        f"copied, not averaged: {'; '.join(parts)}. The candidates differ in them, but they are integers, or buffers "
        "that are no running statistics."
    )
