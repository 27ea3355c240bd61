"""The operations of a step besides arithmetic: two queries for each parameter, samples, and reads if needed."""

from typing import Any

import pytest
import torch
from torch import nn

import twa_scale
from tests import models
from tests.pool import Pool
from tests.ranks import cases
from twa_scale import TwaError
from twa_scale.engines.fsdp2 import FSDP2Engine
from twa_scale.engines.plain import PlainEngine
from twa_scale.ranks import Group


def counting(kind: type, *args: Any) -> Any:
    """Return an engine that counts queries of parameters, and spans that are written or read."""

    class Counting(kind):
        asked = lives = 0

        def changed(self, names: Any) -> Any:
            self.asked += len(names)
            return super().changed(names)

        def live(self, span: Any) -> Any:
            self.lives += 1
            return super().live(span)

    return Counting(*args)


def asked_per_step(combine: str) -> tuple[list[int], int]:
    model = models.wrap(models.build(0), "fsdp2") if combine == "forward" else models.build(0)
    engine = counting(FSDP2Engine, model) if combine == "forward" else counting(PlainEngine, model, Group.alone())
    twa = twa_scale.attach(engine, models.candidates(), {"combine": combine})
    cases.one_step(model, twa, 0)
    actual = []
    for step in range(1, 4):
        before = engine.asked
        cases.one_step(model, twa, step)
        actual.append(engine.asked - before)
    return actual, len(twa.layout.group_of)


@pytest.mark.parametrize("combine", ["step", "forward"])
def test_step_makes_two_queries_for_each_parameter(ranks: Pool, combine: str) -> None:
    ((actual, trained),) = ranks(asked_per_step, 1, combine=combine)
    assert actual == [2 * trained] * 3


def large(scale: float) -> tuple[nn.Module, Any, Any]:
    """Return a float16 model whose norm exceeds the largest float16 value, but no weight does."""
    torch.manual_seed(0)
    model = nn.Linear(64, 64, bias=False).half()
    states = [{name: scale * torch.randn_like(v) for name, v in model.state_dict().items()} for _ in range(3)]
    engine = counting(PlainEngine, model, Group.alone())
    return model, engine, twa_scale.attach(engine, states, {"optimizer": {"name": "sgd", "lr": 1e-3}})


def step(model: nn.Module, twa: Any, weight: float = 1.0) -> None:
    (model(torch.ones(2, 64, dtype=torch.half) / 1e4).float().square().mean() * weight).backward()
    twa.step()


def test_large_weights_in_float16_are_read_once() -> None:
    model, engine, twa = large(1000.0)
    assert max(float(p.detach().float().norm()) for p in model.parameters()) > torch.finfo(torch.float16).max / 4
    before = engine.lives
    for _ in range(5):
        step(model, twa)
    assert engine.lives - before == 20 * len(engine.spans()), (
        "a step counts and makes one write of each span, compares a few weights before and after, and reads no others"
    )


def test_weights_are_read_again_when_coefficients_have_moved_far() -> None:
    model, engine, twa = large(5000.0)
    before = engine.lives
    step(model, twa, 1e2)
    assert engine.lives - before > 4 * len(engine.spans())
    kept = {name: value.clone() for name, value in model.state_dict().items()}
    twa.optimizer.param_groups[0]["lr"] = 1e3
    with pytest.raises(TwaError, match=r"not finite in torch\.float16"):
        step(model, twa)
    assert all(torch.equal(value, kept[name]) for name, value in model.state_dict().items())


def test_a_state_whose_weights_the_model_cannot_hold_is_refused() -> None:
    wide = nn.Linear(4, 3)
    states = [{name: 3e4 * torch.randn_like(v) for name, v in wide.state_dict().items()} for _ in range(3)]
    twa = twa_scale.attach(wide, states, {"optimizer": {"name": "sgd", "lr": 10.0}})
    (wide(torch.ones(2, 4)).square().mean() / 1e8).backward()
    twa.step()
    narrow = nn.Linear(4, 3).half()
    other = twa_scale.attach(narrow, states, {"optimizer": {"name": "sgd", "lr": 10.0}})
    kept = {name: value.clone() for name, value in narrow.state_dict().items()}
    coefficients = other.coefficients
    assert float(wide.weight.detach().abs().max()) > torch.finfo(torch.float16).max
    with pytest.raises(TwaError, match=r"not finite in torch\.float16"):
        other.load_state_dict(twa.state_dict())
    assert torch.equal(other.coefficients, coefficients)
    assert all(torch.equal(value, kept[name]) for name, value in narrow.state_dict().items())
