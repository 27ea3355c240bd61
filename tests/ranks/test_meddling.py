"""What a script does to the model behind the average's back: refused at the next step, on every rank; or used."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import twa_scale
from tests import models, zero
from tests.pool import Pool
from tests.ranks import cases
from tests.ranks.cases import Run
from twa_scale import TwaError
from twa_scale.notices import TwaWarning

RUN = Run({"groups": "block"}, steps=2)


def own_parameter(model: Any) -> Any:
    return next(p for name, p in model.named_parameters() if name.endswith("blocks.1.down.weight"))


def write(model: Any) -> None:
    with torch.no_grad():
        p = own_parameter(model)
        (p.to_local() if isinstance(p, DTensor) else p).mul_(1.0)


def load(model: Any) -> None:
    model.load_state_dict(model.state_dict())


def load_by_assignment(model: Any) -> None:
    model.load_state_dict({name: value.clone() for name, value in model.state_dict().items()}, assign=True)


def convert(model: Any) -> None:
    model.to(torch.float64)


def replace(model: Any) -> None:
    inner = model.module if hasattr(model, "module") else model
    inner.blocks[1].down.weight = nn.Parameter(inner.blocks[1].down.weight.detach().clone())


def meddle(engine: str, change: Callable[[Any], None], on: str) -> tuple[str, bool]:
    """Change the model after a step, on the last rank or on all; return the complaint, and whether a resume works."""
    model, twa = cases.attach(engine, RUN)
    cases.one_step(model, twa, 0)
    state = twa.state_dict()
    rank, size = cases.where()
    if on == "all" or rank == size - 1:
        change(model)
    said = cases.complaint(lambda: cases.one_step(model, twa, 1))
    assert torch.equal(twa.coefficients, state["coefficients"])
    if change is not write:
        return said, True
    twa.load_state_dict(state)
    cases.one_step(model, twa, 1)
    return said, True


@pytest.mark.parametrize("change", [write, load, load_by_assignment, convert, replace])
def test_a_plain_module_that_was_changed_is_refused(change: Callable[[Any], None]) -> None:
    model, twa = cases.attach("plain", RUN)
    cases.one_step(model, twa, 0)
    before = twa.coefficients
    change(model)
    with pytest.raises(TwaError, match=r"parameter '.*' was (written|replaced)"):
        cases.one_step(model, twa, 1)
    assert torch.equal(twa.coefficients, before)


CASES = [
    ("ddp", write, "last"),
    ("ddp", replace, "all"),
    ("fsdp2", write, "last"),
    ("fsdp2", load, "all"),
    ("sharded-ddp", replace, "all"),
    ("zero1", write, "all"),
]


@pytest.mark.parametrize(("engine", "change", "on"), CASES)
def test_every_rank_says_what_one_has_found(ranks: Pool, engine: str, change: Callable[[Any], None], on: str) -> None:
    (said, _), (other, _) = ranks(meddle, 2, engine=engine, change=change, on=on)
    assert said == other and "parameter '" in said and "attach" in said


@pytest.mark.parametrize("engine", ["plain", "ddp", "fsdp2", "fsdp1", "sharded-ddp", *zero.ENGINES])
def test_what_a_script_may_do_between_steps(ranks: Pool, engine: str) -> None:
    for weights in ranks(between_steps, 2, engine=engine):
        assert all(bool(value.isfinite().all()) for value in weights.values())


def between_steps(engine: str) -> dict[str, Tensor]:
    """Evaluate, gather, save, show other weights: none of it writes."""
    model, twa = cases.attach(engine, RUN)
    for step in range(3):
        cases.one_step(model, twa, step)
        with torch.no_grad():
            model.eval()
            models.loss(model, models.batch(50))
            model.train()
        cases.gathered(model)
        model.state_dict()
        with twa.weights("last"), torch.no_grad():
            models.loss(model, models.batch(51))
        twa.load_state_dict(twa.state_dict())
    return cases.gathered(model)


def test_a_gradient_written_by_hand_counts() -> None:
    def trained(by_hand: bool) -> dict[str, Tensor]:
        model, twa = cases.attach("plain", Run({"groups": "block", "optimizer": {"name": "sgd", "lr": 0.01}}))
        named = dict(model.named_parameters())
        loss = models.loss(model, models.batch(0))
        if by_hand:
            tensors = [p for p in named.values() if p.requires_grad]
            for p, gradient in zip(tensors, torch.autograd.grad(loss, tensors), strict=True):
                p.grad = gradient
        else:
            loss.backward()
        assert twa.step()
        return cases.gathered(model)

    want = trained(by_hand=False)
    for name, value in trained(by_hand=True).items():
        torch.testing.assert_close(value, want[name])


def notices_of(wrapped: bool) -> list[str]:
    model = models.build()
    outer = DistributedDataParallel(model) if wrapped else nn.Sequential(model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        twa_scale.attach(model, models.candidates())
    assert outer is not None
    said = [str(warning.message) for warning in caught if issubclass(warning.category, TwaWarning)]
    return [text for text in said if "plain module" in text]


def test_a_module_whose_wrapper_stands_beside_it_is_reported_once(ranks: Pool) -> None:
    said, other = ranks(notices_of, 2, wrapped=True)
    assert len(said) == 1 and "Attach to the DistributedDataParallel" in said[0] and not other
    assert ranks(notices_of, 2, wrapped=False) == [[], []]
