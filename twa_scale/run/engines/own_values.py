"""Models of runs that have values of their own, beside those that candidates give."""

from pathlib import Path

from torch import nn

from twa_scale.base.notices import ignore_notice
from twa_scale.candidates.adapters import ADAPTER_CONFIG
from twa_scale.candidates.find import find_sources
from twa_scale.config import RunConfig
from twa_scale.engines.live_adapter import live_adapter


def candidates_leave_values(config: RunConfig) -> bool:
    """Whether candidates leave values to the model: they are adapters, or `missing: keep` says so.

    Raises:
        CandidateError: candidates that are not there.
    """
    paths = find_sources(config.candidates, 1, ignore_notice, config.select)
    return config.missing == "keep" or any(isinstance(p, Path) and (p / ADAPTER_CONFIG).is_file() for p in paths)


def keeps_values(config: RunConfig, model: nn.Module) -> bool:
    """Whether tensors of a model may keep the value that its task has given them."""
    return config.missing == "keep" or (config.missing == "auto" and live_adapter(model) is not None)
