"""Trainable weight averaging (TWA) of the checkpoints of PyTorch models, sharded or not."""

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

from twa_scale.errors import (
    CandidateError,
    ConfigError,
    EngineError,
    NotFiniteError,
    OutputError,
    RankError,
    StateError,
    TwaError,
)
from twa_scale.version import __version__

if sys.platform == "win32":
    raise ImportError(
        "twa_scale needs file locks and signals of POSIX: it runs on Linux and macOS. On Windows use WSL 2."
    )

if TYPE_CHECKING:
    from twa_scale.average.attach import attach
    from twa_scale.average.average import TrainableAverage
    from twa_scale.average.rates import choose_rate
    from twa_scale.average.search import search
    from twa_scale.base.notices import TwaWarning
    from twa_scale.config import RunConfig, TwaConfig
    from twa_scale.engines.zero import stateless_optimizer
    from twa_scale.output.snapshots import Snapshots
    from twa_scale.running import RunningAverages

__all__ = [
    "CandidateError",
    "ConfigError",
    "EngineError",
    "NotFiniteError",
    "OutputError",
    "RankError",
    "RunConfig",
    "RunningAverages",
    "Snapshots",
    "StateError",
    "TrainableAverage",
    "TwaConfig",
    "TwaError",
    "TwaWarning",
    "__version__",
    "attach",
    "choose_rate",
    "search",
    "stateless_optimizer",
]

# Imported on first use: torch takes seconds, which `twa-scale --help` does not need.
_MODULES = {
    "RunConfig": "twa_scale.config",
    "RunningAverages": "twa_scale.running",
    "Snapshots": "twa_scale.output.snapshots",
    "TrainableAverage": "twa_scale.average.average",
    "TwaConfig": "twa_scale.config",
    "TwaWarning": "twa_scale.base.notices",
    "attach": "twa_scale.average.attach",
    "choose_rate": "twa_scale.average.rates",
    "search": "twa_scale.average.search",
    "stateless_optimizer": "twa_scale.engines.zero",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_MODULES[name]), name)
    return value


def __dir__() -> list[str]:
    return __all__
