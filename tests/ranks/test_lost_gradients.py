"""Gradients after a refused step, in collectives of the script, and of averages that are closed."""

import gc
import warnings
import weakref
from contextlib import nullcontext

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from tests import models
from tests.pool import Pool
from tests.ranks import cases
from tests.ranks.cases import Run
from twa_scale import TwaWarning

RUN = Run({"groups": "block"}, steps=3)


def own_part(step: int) -> models.Batch:
    return models.part(models.batch(step), *cases.where())


def average_by_hand(by_hand: bool) -> tuple[list[str], Tensor]:
    """Train as a script of several replicas does that averages the gradients itself. Collectives write to them."""
    model, twa = cases.attach("plain", RUN)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", TwaWarning)
        for step in range(RUN.steps):
            models.loss(model, own_part(step)).backward()
            for gradient in [p.grad for p in model.parameters() if p.grad is not None] if by_hand else ():
                dist.all_reduce(gradient)
                dist.broadcast(gradient, 0)
                dist.all_gather([torch.empty_like(gradient) for _ in range(2)], gradient)
            twa.step()
            twa.zero_grad()
    return [str(warning.message) for warning in caught], twa.coefficients


def test_collectives_on_projected_gradients_have_no_effect(ranks: Pool) -> None:
    expected, results = (ranks(average_by_hand, 2, by_hand=by_hand) for by_hand in (False, True))
    for rank, ((texts, actual), (no_texts, value)) in enumerate(zip(results, expected, strict=True)):
        assert len(texts) == (rank == 0) and not no_texts
        assert torch.equal(actual, value)


def step_after_a_refused_one(engine: str, refused: bool) -> Tensor:
    """Step on gradients that are not reduced; then on those of one more backward pass."""
    model, twa = cases.attach(engine, RUN)
    if refused:
        models.loss(model, own_part(0)).backward()
        if isinstance(model, FSDPModule):
            model.set_requires_gradient_sync(False)
        with nullcontext() if isinstance(model, FSDPModule) else model.no_sync():  # type: ignore[operator]
            models.loss(model, own_part(1)).backward()
        if isinstance(model, FSDPModule):
            model.set_requires_gradient_sync(True)
        assert "last backward pass" in cases.error_text(twa.step)
    models.loss(model, own_part(2)).backward()
    twa.step()
    coefficients: Tensor = twa.coefficients
    return coefficients


@pytest.mark.parametrize("engine", ["ddp", "fsdp2", "fsdp1"])
def test_a_refused_step_discards_all_gradients(ranks: Pool, engine: str) -> None:
    expected, results = (
        ranks(step_after_a_refused_one, 2, engine=engine, refused=refused) for refused in (False, True)
    )
    assert all(map(torch.equal, results, expected))


def leave(engine: str) -> bool:
    """Return whether nothing of a closed average and its model is left."""
    model, twa = cases.attach(engine, RUN)
    models.loss(model, own_part(0)).backward()
    twa.step()
    twa.close()
    left = weakref.ref(twa), weakref.ref(model)
    del model, twa
    gc.collect()
    return all(reference() is None for reference in left)


@pytest.mark.parametrize("engine", ["plain", "ddp", "fsdp2", "fsdp1", "fsdp1-flat"])
def test_nothing_of_a_closed_average_is_left(ranks: Pool, engine: str) -> None:
    assert all(ranks(leave, 2, engine=engine))
