"""Methods that make one set of weights from a trunk. Each returns what it chose; `Language.row` counts its cost."""

import warnings
from collections.abc import Iterator
from contextlib import closing, contextmanager
from itertools import product
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import load_file

import twa_scale
from examples.proof.language.trunk import Trunk, load
from examples.training import Training
from twa_scale.config import RunConfig
from twa_scale.run.loop import run

Weights = dict[str, torch.Tensor]


class Material(Protocol):
    """What methods work with: the trunk of one seed."""

    training: Training
    trunk: Trunk

    def validation(self) -> float:
        """Return the loss of the model on the validation split."""

    def config(self, name: str, settings: list[str]) -> RunConfig:
        """Return the configuration of a run of TWA."""

    def weights_of(self, method: str) -> Weights:
        """Return the weights of another method."""


def make(on: Material, name: str, method: dict[str, Any]) -> str:
    """Put the weights of a method into the model of `on`, and return what was chosen."""
    match method["how"]:
        case "fixed":
            return fixed(on, method)
        case "ema":
            return ema(on)
        case "greedy":
            return greedy(on)
        case "random":
            return at_random(on)
        case "twa":
            return trained(on, name, method.get("settings", []))
        case "anneal":
            return annealed(on, method)
        case "decayed":
            return decayed(on, method["steps"])
        case other:
            raise ValueError(f"{name}: how: {other} is unknown")


def fixed(on: Material, method: dict[str, Any]) -> str:
    """Take the best of several fixed averages of the last candidates."""
    best, chosen = float("inf"), ("", 0)
    options = list(product(method["which"], method.get("last", [on.trunk.settings["candidates"]])))
    for which, last in options if len(options) > 1 else []:
        with attached(on, last, method) as average, average.weights(which):
            if (loss := on.validation()) < best:
                best, chosen = loss, (which, last)
    which, last = chosen if len(options) > 1 else options[0]
    with attached(on, last, method) as average:
        average.start_from(which)
    return f"{which} of {last}"


def ema(on: Material) -> str:
    """Take the best of the exponential averages of the trunk."""
    losses = {}
    for name in on.trunk.ema_names:
        on.training.model.load_state_dict(load(on.trunk.ema(name)))
        losses[name] = on.validation()
    best = min(losses, key=losses.__getitem__)
    on.training.model.load_state_dict(load(on.trunk.ema(best)))
    return best


def greedy(on: Material) -> str:
    """Make the greedy soup of all candidates."""
    with attached(on, on.trunk.settings["candidates"], {}) as average:
        found = twa_scale.search(average, on.validation, "greedy", higher_is_better=False)
    return f"{int((found.best.coefficients > 0).sum())} candidates"


def at_random(on: Material) -> str:
    """Draw the coefficients of each tensor uniformly from those that are positive and sum to 1."""
    generator = torch.Generator().manual_seed(on.config("", []).seed)
    with attached(on, on.trunk.settings["candidates"], {"groups": "tensor"}) as average:
        draws = torch.empty_like(average.coefficients).exponential_(generator=generator)
        average.start_from(draws / draws.sum(0))
    return "one draw"


def trained(on: Material, name: str, settings: list[str]) -> str:
    """Train the coefficients as `twa-scale run` does."""
    config = on.config(name, settings)
    summary = run(config)
    on.training.model.load_state_dict(load_file(Path(config.output) / "average" / "model.safetensors"))
    return f"step {summary['exported_step']}"


def annealed(on: Material, method: dict[str, Any]) -> str:
    """Train on from the weights of another method, or the last ones, with a rate that falls linearly to zero."""
    steps = on.trunk.settings["steps"]
    on.training.restore(load(on.trunk.state(steps)))
    if "start" in method:  # AdamW keeps the moments of the trunk
        on.training.model.load_state_dict(on.weights_of(method["start"]))
    on.training.decay(steps, steps + method["steps"], method.get("rate", 1.0))
    return f"from {method.get('rate', 1.0)} of the rate"


def decayed(on: Material, extra: int) -> str:
    """Let the rate fall linearly to zero over the last fifth of the trunk's steps and `extra`."""
    stop = on.trunk.settings["steps"] + extra
    start = branch(on.trunk.settings["steps"], extra)
    on.training.restore(load(on.trunk.state(start)))
    on.training.decay(start, stop)
    return f"from step {start}"


def branch(steps: int, extra: int) -> int:
    """Return the step at which a decayed run leaves a trunk of `steps`: after four fifths of all that it takes."""
    return min(steps, round(0.8 * (steps + extra)))


@contextmanager
def attached(on: Material, last: int, method: dict[str, Any]) -> Iterator[twa_scale.TrainableAverage]:
    """Attach an average of the last candidates for a `with` block; the model keeps the weights of its end."""
    select = {"last": last, "order": method.get("order", "given")}
    config = {"groups": method.get("groups", "global"), "select": select}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "candidates: .* are taken", twa_scale.TwaWarning)  # as was asked
        average = twa_scale.attach(on.training.model, on.trunk.candidates, config)
    with closing(average):
        yield average
