"""Methods that make one set of weights from a trunk. Each returns what it chose."""

from itertools import product
from typing import TYPE_CHECKING, Any

import torch

from examples.proof.averages import attached, greedy, trained
from examples.proof.extrapolated import options
from examples.proof.files import load
from examples.proof.trial_optimizers import in_place_of_adamw
from examples.proof.trunk import write_candidates
from twa_scale import RunningAverages

if TYPE_CHECKING:
    from examples.proof.trunk_work import TrunkWork


def make(on: "TrunkWork", name: str, method: dict[str, Any]) -> str:
    """Put the weights of a method into the model of `on`, and return what was chosen."""
    match method["how"]:
        case "fixed":
            return fixed(on, method)
        case "ema":
            return ema(on)
        case "greedy":
            return greedy(on.model, on.candidates(method), on.score)
        case "extra-merge" | "bema":
            return extrapolated(on, method)
        case "random":
            return at_random(on, method)
        case "twa":
            with in_place_of_adamw(method.get("optimizer"), method.get("options", {})):
                return trained(on.model, on.config(name, method))
        case "anneal":
            return annealed(on, method)
        case "decayed":
            return decayed(on, name, method)
        case other:
            raise ValueError(f"{name}: how: {other} is unknown")


def fixed(on: "TrunkWork", method: dict[str, Any]) -> str:
    """Take the best of several fixed averages of the last candidates, or of the only one that is asked for."""
    averages = list(product(method["which"], method.get("last", [None])))
    best, chosen = float("inf"), averages[0]
    for which, last in averages if len(averages) > 1 else []:
        with attached(on.model, on.candidates(method), select=selection(last, method, on.seed)) as average:
            average.start_from(which)
            if (loss := on.score()) < best:
                best, chosen = loss, (which, last)
    which, last = chosen
    with attached(on.model, on.candidates(method), select=selection(last, method, on.seed)) as average:
        average.start_from(which)
    return f"{which} of {last or 'all'}"


def selection(last: int | None, method: dict[str, Any], seed: int) -> dict[str, Any]:
    return {"last": last, "order": method.get("order", "given"), "seed": seed}


def ema(on: "TrunkWork") -> str:
    """Take the best of the exponential averages of the trunk."""
    losses = {}
    for name in on.trunk.ema_names:
        on.model.load_state_dict(load(on.trunk.ema(name)))
        losses[name] = on.score()
    best = min(losses, key=losses.__getitem__)
    on.model.load_state_dict(load(on.trunk.ema(best)))
    return best


def extrapolated(on: "TrunkWork", method: dict[str, Any]) -> str:
    """Take the best of several averages that go on in the direction of training."""
    with attached(on.model, on.candidates(method)) as average:
        made = options(method, len(average.coefficients), on.trunk.settings["every"])
        losses = {}
        for name, coefficients in made.items():
            average.start_from(coefficients.unsqueeze(1))
            losses[name] = on.score()
        best = min(losses, key=losses.__getitem__)
        average.start_from(made[best].unsqueeze(1))
    return best


def at_random(on: "TrunkWork", method: dict[str, Any]) -> str:
    """Draw the coefficients of each tensor uniformly from those that are positive and sum to 1."""
    generator = torch.Generator().manual_seed(on.seed)
    with attached(on.model, on.candidates(method), groups="tensor") as average:
        draws = torch.empty_like(average.coefficients).exponential_(generator=generator)
        average.start_from(draws / draws.sum(0))
    return "one draw"


def annealed(on: "TrunkWork", method: dict[str, Any]) -> str:
    """Train on from the weights of another method, or the last ones, with a rate that falls linearly to zero."""
    steps = on.trunk.settings["steps"]
    on.training.restore(load(on.trunk.state(steps)))
    if "start" in method:  # AdamW keeps the moments of the trunk
        on.model.load_state_dict(on.weights_of(method["start"]))
    on.training.decay(steps, steps + method["steps"], method.get("rate", 1.0))
    return f"from {method.get('rate', 1.0)} of the rate"


def decayed(on: "TrunkWork", name: str, method: dict[str, Any]) -> str:
    """Let the rate fall linearly to zero over the last fifth of all steps; leave `candidates` of this part, if any."""
    steps = on.trunk.settings["steps"]
    start, stop = branch(steps, method["steps"]), steps + method["steps"]
    on.training.restore(load(on.trunk.state(start)))
    number = method.get("candidates", 0)
    if not number:
        on.training.decay(start, stop)
        return f"from step {start}"
    if number > stop - start:
        raise ValueError(f"{name}: {number} candidates cannot be taken from {stop - start} steps")
    window = {"every": (stop - start) // number, "keep": number, "store": "dense32"}
    averages = RunningAverages(on.model, window=window)
    on.training.decay(start, stop, after_step=averages.step)
    write_candidates(averages, on.candidates_of(name))
    return f"from step {start}"


def branch(steps: int, extra: int) -> int:
    """Return the step at which a decayed run leaves a trunk of `steps`: after four fifths of all that it takes."""
    return min(steps, round(0.8 * (steps + extra)))
