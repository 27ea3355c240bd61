"""Averages of candidates that more than one task makes."""

import shutil
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import nn

import twa_scale
from twa_scale.config import RunConfig
from twa_scale.run.loop import run

Candidates = str | Sequence[str]


@contextmanager
def attached(model: nn.Module, candidates: Candidates, **config: Any) -> Iterator[twa_scale.TrainableAverage]:
    """Attach an average for a `with` block; the model keeps the weights of its end."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "candidates: .* are taken", twa_scale.TwaWarning)  # as was asked
        warnings.filterwarnings("ignore", "copied, not averaged", twa_scale.TwaWarning)  # counters of BatchNorm
        average = twa_scale.attach(model, candidates, config)
    with closing(average):
        yield average


def greedy(model: nn.Module, candidates: Candidates, score: Callable[[], float]) -> str:
    """Make the greedy soup: candidates are added in the order of their own losses while that of the average falls."""
    with attached(model, candidates) as average:
        found = twa_scale.search(average, score, "greedy", higher_is_better=False)
    return f"{int((found.best.coefficients > 0).sum())} candidates"


def trained(model: nn.Module, config: RunConfig) -> str:
    """Train the coefficients as `twa-scale run` does."""
    summary = run(config)
    exported = Path(config.output) / "average"
    model.load_state_dict(load_file(exported / "model.safetensors"))
    shutil.rmtree(exported)  # `Work.row` keeps the weights of every method
    return f"step {summary['exported_step']}"
