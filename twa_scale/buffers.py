"""Tensors that are no weights, told by their names: a checkpoint does not say which of its tensors are buffers."""

import re

_STATISTIC = re.compile(r"(^|\.)(running|moving)_(mean|var|variance|std|avg|average)$")


def is_statistic(name: str) -> bool:
    """Whether a tensor is a running statistic, as BatchNorm and InstanceNorm keep: `running_mean`, `running_var`, .."""
    return _STATISTIC.search(name) is not None
