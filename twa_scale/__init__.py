"""Trainable weight averaging (TWA) of checkpoints of models that exist only sharded."""

from twa_scale.attach import attach
from twa_scale.average import TrainableAverage
from twa_scale.config import RunConfig, TwaConfig
from twa_scale.engines.zero import stateless_optimizer
from twa_scale.errors import CandidateError, ConfigError, EngineError, OutputError, RankError, StateError, TwaError
from twa_scale.notices import TwaWarning
from twa_scale.snapshots import Snapshots
from twa_scale.version import __version__

__all__ = [
    "CandidateError",
    "ConfigError",
    "EngineError",
    "OutputError",
    "RankError",
    "RunConfig",
    "Snapshots",
    "StateError",
    "TrainableAverage",
    "TwaConfig",
    "TwaError",
    "TwaWarning",
    "__version__",
    "attach",
    "stateless_optimizer",
]
