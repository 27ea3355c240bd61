"""Averages of candidates that more than one task makes."""

import shutil
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from itertools import chain
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


def greedy(
    model: nn.Module, candidates: Candidates, score: Callable[[], float], known: Sequence[float] = (), **config: Any
) -> str:
    """Make the greedy soup: candidates are added in the order of their own losses while that of the average falls.

    Args:
        model: the model, which gets the weights.
        candidates: the candidates.
        score: returns the loss of the weights in the model.
        known: the losses of all candidates, in their order, if they have been evaluated before.
        config: of the average.
    """
    scores = chain(known, iter(score, None))  # the search evaluates the candidates first, in their order
    with attached(model, candidates, **config) as average:
        found = twa_scale.search(average, lambda: next(scores), "greedy", higher_is_better=False)
    return f"{int((found.best.coefficients > 0).sum())} candidates"


def trained(model: nn.Module, config: RunConfig) -> str:
    """Train the coefficients as `twa-scale run` does, and load the average into the model."""
    with exported(config) as (average, chosen):
        model.load_state_dict(load_file(average / "model.safetensors"))
    return chosen


@contextmanager
def exported(config: RunConfig) -> Iterator[tuple[Path, str]]:
    """Train the coefficients as `twa-scale run` does, for a `with` block.

    Yields:
        The directory of the average, which is removed at the end because `Work.row` keeps the weights, and its step.
    """
    summary = run(config)
    average = Path(config.output) / "average"
    yield average, f"step {summary['exported_step']}"
    shutil.rmtree(average)
