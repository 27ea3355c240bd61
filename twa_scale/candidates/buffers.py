"""Recognize buffers by their names, because a checkpoint does not record which of its tensors are buffers."""

import re
from collections.abc import Collection, Mapping, Sequence

from twa_scale.base.names import quoted
from twa_scale.config import candidate_index

Source = Sequence[float] | int
"""The source of a buffer: weights of the candidates, or the index of the candidate from which it is copied."""

_STATISTIC = re.compile(r"(^|\.)(running|moving)_(mean|var|variance|std|avg|average)$")
_COUNTER = re.compile(r"(^|\.)num_batches_tracked$")
_NEIGHBORS = (
    (re.compile(r"^(?P<stem>(.*\.)?parametrizations\.[^.]+)\.\d+\._[uv]$"), (".original",), None),
    (re.compile(r"^(?P<stem>.*)_[uv]$"), ("_orig", "_bar"), None),
    (re.compile(r"^(?P<stem>.*)_mask$"), ("_orig",), None),
    (re.compile(r"^(?P<stem>(.*\.)?)min_val$"), ("max_val",), None),
    (re.compile(r"^(?P<stem>(.*\.)?)max_val$"), ("min_val",), None),
    (re.compile(r"^(?P<stem>(.*\.)?)scale$"), ("fake_quant_enabled",), "learning_enabled"),
)
"""Patterns of names of buffers, the ends of names next to them, and the end of a name that shows a parameter."""


def is_statistic(name: str) -> bool:
    """Return whether a tensor is a running statistic, as of BatchNorm: `running_mean`, `running_var` and others."""
    return _STATISTIC.search(name) is not None


def own_buffers(names: Collection[str]) -> set[str]:
    """Return buffers that belong to the weights of one candidate, recognized by other tensors of the module.

    - the vectors u and v of spectral norms: `weight_u` next to `weight_orig` (`torch.nn.utils.spectral_norm`) or
      `weight_bar`; `parametrizations.weight.0._u` next to `parametrizations.weight.original`
    - masks of `torch.nn.utils.prune`: `weight_mask` next to `weight_orig`
    - observers and scales of quantization-aware training: `min_val` next to `max_val`, `scale` next to
      `fake_quant_enabled`, unless `learning_enabled` shows that the scale is trained
    """
    result, names = set(), set(names)
    for name in names:
        for pattern, neighbors, unless in _NEIGHBORS:
            match = pattern.match(name)
            if not match or (unless and f"{match['stem']}{unless}" in names):
                continue
            if any(f"{match['stem']}{neighbor}" in names for neighbor in neighbors):
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
