"""Models that keep their own values for tensors that are not in the candidates."""

from pathlib import Path

from torch import nn

from twa_scale.base.notices import ignore_notice
from twa_scale.base.urls import Url
from twa_scale.candidates.adapters import ADAPTER_CONFIG
from twa_scale.candidates.find import find_sources
from twa_scale.config import RunConfig
from twa_scale.engines.live_adapter import live_adapter
from twa_scale.ranks import Group


def candidates_leave_values(config: RunConfig) -> bool:
    """Return whether the model keeps values: it has an adapter, or `missing` is `keep`. Collective.

    Only one rank reads the directory, because ranks that see different files would wait for each other.

    Raises:
        CandidateError: candidates are not found.
    """
    if config.missing == "keep" or config.task.options.get("adapter") is not None:
        return True
    group, result = Group.world(), False
    with group.agree():
        if group.rank == 0:
            paths = find_sources(config.candidates, 1, ignore_notice, config.select)
            result = any(isinstance(path, Path | Url) and (path / ADAPTER_CONFIG).is_file() for path in paths)
    return group.broadcast(result)


def keeps_values(config: RunConfig, model: nn.Module) -> bool:
    """Return whether tensors of `model` may keep the values from its task."""
    return config.missing == "keep" or (config.missing == "auto" and live_adapter(model) is not None)
