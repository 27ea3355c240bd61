"""The settings of the optimizer of the coefficients, and a list of the optimizers of torch, without importing it."""

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

from pydantic import ConfigDict, Field, PositiveFloat, field_validator, model_validator

from twa_scale.config.section import Section

LISTS = {"betas": 2, "etas": 2, "step_sizes": 2, "ns_coefficients": 3}
"""Options that are lists, with their lengths."""
_PAIRS = {("adafactor", "eps")}  # a list here, a number in other optimizers; the first may be null: use the default
FLAGS = ("amsgrad", "centered", "decoupled_weight_decay", "foreach", "fused", "maximize", "nesterov")
OPTIONS = {
    "adadelta": "rho eps weight_decay foreach maximize",
    "adafactor": "beta2_decay eps d weight_decay foreach maximize",
    "adagrad": "lr_decay weight_decay initial_accumulator_value eps foreach fused maximize",
    "adam": "betas eps weight_decay amsgrad decoupled_weight_decay foreach fused maximize",
    "adamax": "betas eps weight_decay foreach maximize",
    "adamw": "betas eps weight_decay amsgrad foreach fused maximize",
    "asgd": "lambd alpha t0 weight_decay foreach maximize",
    "muon": "weight_decay momentum nesterov ns_coefficients eps ns_steps",
    "nadam": "betas eps weight_decay momentum_decay decoupled_weight_decay foreach maximize",
    "radam": "betas eps weight_decay decoupled_weight_decay foreach maximize",
    "rmsprop": "alpha eps weight_decay momentum centered foreach maximize",
    "rprop": "etas step_sizes foreach maximize",
    "sgd": "momentum dampening weight_decay nesterov foreach fused maximize",
}
"""The options by lower-case name, without those that need autograd or a GPU: the coefficients are on the CPU."""
_UNSUPPORTED = {
    "lbfgs": "it evaluates the loss several times in a step, through a closure, but a step has one gradient here",
    "sparseadam": "it needs sparse gradients, but those of coefficients are dense",
}

RATES = {
    **dict.fromkeys((("adam", "delta"), ("adamw", "delta"), ("adamax", "delta"), ("nadam", "delta")), 0.01),
    ("sgd", "weight"): 2.0,
}
"""The usual learning rate of an optimizer, by its name and `units`, from trials, or for SGD from the published code."""


class OptimizerConfig(Section):
    """The optimizer of the coefficients: a class of torch.optim. Other keys are arguments of its constructor."""

    model_config = ConfigDict(extra="allow")

    name: str = Field(
        "adamw",
        description="Class of torch.optim, in any case: `adamw`, `sgd`, ..; not `lbfgs` or `sparseadam`.",
    )
    lr: PositiveFloat | Literal["auto"] = Field(
        0.01,
        description="Learning rate, in the units of `units`. With `auto`, a run first takes a few steps with "
        "each of three rates, and then trains with the one that has the best evaluation on `evaluate_split`: a third "
        "of the usual rate of the optimizer (0.01 for `adamw` with `units: delta`), that rate, and three times it.",
    )
    row_lr: PositiveFloat | None = Field(
        None, description="Learning rate of the corrections per row (`groups: tensor+row`); by default a tenth of `lr`."
    )

    @field_validator("name")
    @classmethod
    def _known_name(cls, name: str) -> str:
        check_name(name)
        return name

    @model_validator(mode="after")
    def _known_options(self) -> "OptimizerConfig":
        check_options(self.name, self.model_extra or {})
        return self

    @property
    def options(self) -> dict[str, Any]:
        """The constructor arguments other than lr.

        The default `weight_decay` of AdamW is 0 here, since decay would pull the average to the center.
        """
        extra = dict(self.model_extra or {})
        if self.name.lower() == "adamw":
            extra.setdefault("weight_decay", 0.0)
        return extra


def check_name(name: str) -> None:
    """Check that an optimizer can train coefficients.

    Raises:
        ValueError: names the reason; pydantic adds the key.
    """
    if reason := _UNSUPPORTED.get(name.lower()):
        raise ValueError(f"{name!r} cannot train coefficients: {reason}; use adamw or sgd")
    if name.lower() not in OPTIONS:
        raise ValueError(f"{name!r} is not one of {', '.join(OPTIONS)}")


def check_options(name: str, options: Mapping[str, Any]) -> None:
    """Check the names of options of an optimizer, and the kinds of their values.

    Raises:
        ValueError: names the option; pydantic adds the key.
    """
    known = OPTIONS[name.lower()].split()
    for key, value in options.items():
        if key not in known:
            raise ValueError(f"{name} takes no {key!r}; it takes {', '.join(('lr', *known))}")
        fits, kind = _kind(name.lower(), key)
        if not fits(value):
            raise ValueError(f"{key!r} of {name} has to be {kind} (got {value!r})")


def _kind(name: str, key: str) -> tuple[Callable[[Any], bool], str]:
    if (name, key) in _PAIRS:
        return _is_pair, "a list of two numbers, the first of which may be null"
    if key in ("foreach", "fused"):
        return lambda value: value is None or isinstance(value, bool), "true, false or null"
    if key in FLAGS:
        return lambda value: isinstance(value, bool), "true or false"
    if length := LISTS.get(key):
        return lambda value: _is_list(value, length), f"a list of {length} numbers"
    if key == "ns_steps":
        return lambda value: type(value) is int, "an integer"
    return _is_number, "a finite number"


def _is_list(value: Any, length: int) -> bool:
    return isinstance(value, list | tuple) and len(value) == length and all(map(_is_number, value))


def _is_pair(value: Any) -> bool:
    return isinstance(value, list | tuple) and (_is_list(value, 2) or (_is_list(value[1:], 1) and value[0] is None))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
