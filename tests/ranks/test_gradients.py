"""Gradients are freed when they are projected, forgotten on request, and refused if they are not finite."""

import copy
import pickle
import warnings
from contextlib import nullcontext
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import twa_scale
from tests import flattened, models, reference, zero
from tests.grid import rest_slow
from tests.pool import Pool
from tests.ranks import cases
from tests.ranks.cases import Run
from twa_scale import TwaError, TwaWarning
from twa_scale.engines.projected_gradients import ProjectedGradients
from twa_scale.engines.zero import is_deepspeed

ENGINES = ["plain", "ddp", "fsdp2", *flattened.ENGINES]
SIZES = [1, 2, 3]
RUN = Run({"groups": "block"}, steps=3)
OF_ONE = [(engine,) for engine in (*ENGINES, *zero.ENGINES)]
EACH_KIND = ["plain", "fsdp2", "fsdp1-flat", "zero2"]  # replicas, shards of rows, flat shards, DeepSpeed


def own_part(step: int) -> models.Batch:
    rank, size = cases.where()
    return models.part(models.batch(step), rank, size)


def gradients_left(engine: str) -> tuple[list[str], list[str]]:
    """Return the names of tensors that have a gradient after backward, and after a step."""
    model, twa = cases.attach(engine, RUN)
    models.loss(model, own_part(0)).backward()
    after_backward = [
        name for name, p in model.named_parameters() if p.grad is not None and not ProjectedGradients.is_mark(p.grad)
    ]
    twa.step()
    stored = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    if engine == "sharded-ddp":  # views of buckets that fairscale will fill again
        stored = {name: gradient for name, gradient in stored.items() if gradient.any()}
    return after_backward, list(stored)


@pytest.mark.parametrize("engine", ENGINES)
def test_gradients_are_freed(ranks: Pool, engine: str) -> None:
    """Before the step, FSDP2 has gradients of ignored parameters only, and engines without hooks have all."""
    for after_backward, after_step in ranks(gradients_left, 2, engine=engine):
        allowed = {"plain": [], "fsdp2": [models.SCALAR] if models.SCALAR_SHAPE == () else []}.get(
            engine, after_backward
        )
        assert after_backward == allowed
        assert after_step == []


def clip_and_discard(engine: str) -> tuple[list[str], str, str, bool]:
    """Use projected gradients twice. Discard them before a step, and before the last of two backward passes."""
    model, twa = cases.attach(engine, RUN)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", TwaWarning)
        for step in range(2):
            models.loss(model, own_part(step)).backward()
            projected = [p for p in model.parameters() if p.grad is not None and ProjectedGradients.is_mark(p.grad)]
            assert not nn.utils.clip_grad_norm_(projected, 1.0).any()
            nn.utils.clip_grad_value_(projected, 1.0)
            pickle.dumps(projected[0])  # a warning of torch about hooks would be recorded
            assert not copy.deepcopy(projected[0].grad).any()  # type: ignore[union-attr]
        twa.step()
    models.loss(model, own_part(2)).backward()
    model.zero_grad()
    at_step = cases.error_text(twa.step)
    models.loss(model, own_part(3)).backward()
    model.zero_grad()
    models.loss(model, own_part(4)).backward()
    in_accumulation = cases.error_text(twa.step)
    models.loss(model, own_part(5)).backward()
    moved = twa.step()
    twa.close()
    return [str(warning.message) for warning in caught], at_step, in_accumulation, moved


@pytest.mark.parametrize("engine", ["plain", "fsdp2", "tp"])
def test_use_of_projected_gradients_is_reported(ranks: Pool, engine: str) -> None:
    for rank, (texts, at_step, in_accumulation, moved) in enumerate(ranks(clip_and_discard, 2, engine=engine)):
        assert len(texts) == (rank == 0) and all("max_weight_grad_norm" in text for text in texts)
        assert "discarded" in at_step and at_step == in_accumulation
        assert moved


def forget_a_backward(engine: str, forget: bool) -> dict[str, Tensor]:
    model, twa = cases.attach(engine, RUN)
    for step in range(RUN.steps):
        if forget:
            models.loss(model, own_part(100 + step)).mul(50).backward()
            twa.zero_grad()
        cases.one_step(model, twa, step)
    return cases.gathered(model)


@pytest.mark.parametrize("engine", rest_slow(OF_ONE, lambda engine: engine in EACH_KIND))
def test_zero_grad_drops_a_backward_pass(ranks: Pool, engine: str) -> None:
    for size in (1, 2):
        plain, forgetful = (ranks(forget_a_backward, size, engine=engine, forget=forget)[0] for forget in (False, True))
        for name, value in plain.items():
            torch.testing.assert_close(forgetful[name], value, rtol=1e-6, atol=1e-7, msg=lambda m: f"{name}: {m}")  # noqa: B023


def step_without_zero_grad(engine: str, zero: bool) -> dict[str, Tensor]:
    model, twa = cases.attach(engine, RUN)
    for step in range(2):
        models.loss(model, own_part(step)).backward()
        twa.step()
        if zero:
            twa.zero_grad()
    return cases.gathered(model)


@pytest.mark.parametrize("engine", ENGINES)
def test_every_engine_accumulates_alike_without_zero_grad(ranks: Pool, engine: str) -> None:
    """All engines free the gradients in a step."""
    expected = ranks(step_without_zero_grad, 1, engine="plain", zero=False)[0]
    for name, value in ranks(step_without_zero_grad, 1, engine=engine, zero=False)[0].items():
        assert (value - expected[name]).norm() <= 1e-5 * expected[name].norm(), name


def accumulate(engine: str, late: bool) -> dict[str, Tensor]:
    """Make two backward passes per step. With `late`, gradients are reduced in the second one only."""
    model, twa = cases.attach(engine, RUN)
    rank, size = cases.where()
    for step in range(RUN.steps):
        first, second = cases.micro_batches(step, size, 2)[2 * rank : 2 * rank + 2]
        with model.no_sync() if late and hasattr(model, "no_sync") else nullcontext():  # type: ignore[operator]
            if isinstance(model, FSDPModule):
                model.set_requires_gradient_sync(not late)
            (models.loss(model, first) / 2).backward()
        if isinstance(model, FSDPModule):
            model.set_requires_gradient_sync(True)
        (models.loss(model, second) / 2).backward()
        twa.step()
        twa.zero_grad()
    return cases.gathered(model)


@pytest.mark.parametrize(
    "engine", rest_slow([(engine,) for engine in ENGINES[1:]], lambda engine: engine not in ("fsdp1", "sharded-ddp"))
)
def test_gradients_that_are_reduced_late_are_the_same(ranks: Pool, engine: str) -> None:
    at_once, late = (ranks(accumulate, 2, engine=engine, late=late) for late in (False, True))
    for expected, weights in zip(at_once, late, strict=True):
        for name, value in expected.items():
            assert (weights[name] - value).norm() <= 1e-5 * value.norm(), name


def step_inside_no_sync() -> tuple[str, str, bool]:
    """Step on gradients that DDP has not averaged; then again after a pass that averages, and after forgetting."""
    model, twa = cases.attach("ddp", RUN)
    with model.no_sync():  # type: ignore[operator]
        models.loss(model, own_part(0)).backward()
    refused = cases.error_text(twa.step)
    models.loss(model, own_part(0)).backward()
    averaged = cases.error_text(twa.step)
    with model.no_sync():  # type: ignore[operator]
        models.loss(model, own_part(0)).backward()
    twa.zero_grad()
    loss = models.loss(model, own_part(1))
    with torch.no_grad():
        models.loss(model, own_part(2))  # DDP remembers that it does not synchronize them
    loss.backward()
    return refused, averaged, twa.step()


def test_ddp_averages_before_a_step(ranks: Pool) -> None:
    for refused, averaged, moved in ranks(step_inside_no_sync, 2):
        assert "no_sync" in refused and not averaged and moved


def skip_a_tensor(engine: str) -> dict[str, Tensor]:
    """Train with a loss that does not reach the embedding mix or the blocks."""
    model, twa = cases.attach(engine, RUN)
    for step in range(RUN.steps):
        stem_loss(model, own_part(step)).backward()
        twa.step()
        twa.zero_grad()
    return cases.gathered(model)


def stem_loss(model: nn.Module, data: models.Batch) -> Tensor:
    dtype = next(p.dtype for p in model.parameters())
    token: Tensor = model.get_submodule("stem")(data["image"].to(dtype))
    return token.square().mean()


def test_tensors_that_the_loss_does_not_reach_stay(ranks: Pool) -> None:
    for size in (1, 2):
        steps = [cases.micro_batches(step, size) for step in range(RUN.steps)]
        expected = reference.train(models.build(), stem_loss, models.candidates(), RUN.config, steps).weights[-1]
        for weights in ranks(skip_a_tensor, size, engine="plain"):
            for name, value in expected.items():
                assert (weights[name].double() - value).norm() <= 1e-5 * value.norm(), name


def overflow(engine: str, rank: int) -> tuple[str, bool, bool]:
    """Make a step with an infinite loss on one rank. Return the error, and whether weights and training are intact."""
    model, twa = cases.attach(engine, RUN)
    cases.one_step(model, twa, 0)
    before = cases.gathered(model)
    loss = models.loss(model, own_part(1))
    (loss * float("inf") if cases.where()[0] == rank else loss).backward()
    message = ""
    try:
        twa.step()
    except TwaError as error:
        message = str(error)
    same = all(torch.equal(value, before[name]) for name, value in cases.gathered(model).items())
    twa.zero_grad()
    cases.one_step(model, twa, 2)
    return message, same, all(bool(value.isfinite().all()) for value in cases.gathered(model).values())


@pytest.mark.parametrize("engine", rest_slow(OF_ONE, lambda engine: engine in EACH_KIND))
def test_a_gradient_that_is_not_finite_is_refused_on_every_rank(ranks: Pool, engine: str) -> None:
    for size, rank in ((1, 0), (3, 1)):
        results = ranks(overflow, size, engine=engine, rank=rank)
        assert results[0][0] and len({message for message, _, _ in results}) == 1
        assert all(same for _, same, _ in results), "the weights have changed"
        assert all(finite for _, _, finite in results), "the run cannot go on after zero_grad"


def narrow() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        return nn.Linear(4, 2)


def narrow_loss(model: nn.Module, data: Tensor) -> Tensor:
    return F.cross_entropy(model(data.to(next(model.parameters()).dtype)), torch.arange(len(data)) % 2)


def narrow_candidates() -> list[dict[str, Tensor]]:
    base = narrow().state_dict()
    noise = torch.Generator().manual_seed(6)
    return [{k: v + 0.1 * torch.randn(v.shape, generator=noise) for k, v in base.items()} for _ in range(3)]


def narrow_data(step: int, size: int) -> list[Tensor]:
    return list(torch.randn(12, 4, generator=torch.Generator().manual_seed(step)).chunk(size))


def train_narrow(engine: str) -> tuple[dict[str, Tensor], int]:
    model = narrow()
    if engine == "ddp":
        model = DistributedDataParallel(model)
    elif engine == "fsdp2":
        fully_shard(model)
    elif engine in flattened.ENGINES:
        model = flattened.wrap_module(model, engine)
    elif engine in zero.ENGINES:
        model = zero.wrap(model, engine)
    twa = twa_scale.attach(model, candidates=narrow_candidates(), config={"groups": "tensor"})
    rank, size = cases.where()
    for step in range(5):
        narrow_loss(model, narrow_data(step, size)[rank]).backward()
        twa.step()
        twa.zero_grad()
    return cases.gathered(model), twa.bytes_read


@pytest.mark.parametrize(
    ("engine", "size"),
    rest_slow(
        product([*ENGINES, *zero.ENGINES], SIZES),
        lambda engine, size: engine in EACH_KIND and size == (1 if engine == "plain" else 3),
    ),
)
def test_rank_without_elements_takes_part(ranks: Pool, engine: str, size: int) -> None:
    steps = [narrow_data(step, size) for step in range(5)]
    expected = reference.train(narrow(), narrow_loss, narrow_candidates(), {"groups": "tensor"}, steps).weights[-1]
    results = ranks(train_narrow, size, engine=engine)
    for weights, _ in results:
        for name, value in expected.items():
            assert (weights[name].double() - value).norm() <= 1e-5 * value.norm(), name
    if engine in ("fsdp2", "sharded-ddp") and size == 3:
        assert results[2][1] == 0, "a rank without rows has read something"


def test_one_process_needs_no_process_group() -> None:
    model, twa = cases.attach("plain", RUN)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(twa.optimizer, T_max=10)
    assert isinstance(twa.optimizer, torch.optim.Optimizer)
    before = cases.gathered(model)
    losses = []
    for _ in range(10):
        loss = models.loss(model, models.batch(0))
        losses.append(loss.item())
        loss.backward()
        twa.step()
        twa.zero_grad()
        scheduler.step()
    assert losses[-1] < losses[0]
    moved = {name for name, value in cases.gathered(model).items() if not torch.equal(value, before[name])}
    assert moved == before.keys() - {models.FROZEN, models.EQUAL}
    with torch.no_grad():
        after = cases.gathered(model)
    twa.close()
    models.loss(model, models.batch(0)).backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad), "close leaves the hooks on"
    assert all(torch.equal(value, after[name]) for name, value in cases.gathered(model).items())


def attach_twice(engine: str) -> None:
    model, twa = cases.attach(engine, RUN)
    twa.close()
    states = models.candidates(scalar_shape=(1,) if engine in zero.ENGINES else RUN.scalar_shape)
    twa_scale.attach(model, candidates=states)
    twa_scale.attach(model, candidates=states)


@pytest.mark.parametrize(
    "engine",
    rest_slow(
        [(engine,) for engine in ("ddp", *flattened.ENGINES, *zero.ENGINES)],
        lambda engine: engine in ("ddp", "fsdp1-flat", "zero2"),
    ),
)
def test_a_second_average_is_refused_until_the_first_is_closed(ranks: Pool, engine: str) -> None:
    assert "another average is attached" in str(ranks.error(attach_twice, 2, engine=engine))


CLIPPED = {"max_weight_grad_norm": 1.0}


def backward(model: Any, loss: torch.Tensor) -> None:
    if is_deepspeed(model):
        model.backward(loss)
    else:
        loss.backward()


def train_what_is_shown(engine: str, config: dict[str, Any]) -> None:
    model, twa = cases.attach(engine, Run({**RUN.config, **config}))
    with twa.weights("last"):
        backward(model, models.loss(model, own_part(0)))


def train_what_is_shown_unsynchronized() -> None:
    model, twa = cases.attach("fsdp2", RUN)
    cases.one_step(model, twa, 0)
    assert isinstance(model, FSDPModule)
    model.set_requires_gradient_sync(False)
    with twa.weights("last"):
        backward(model, models.loss(model, own_part(0)))


def test_an_unsynchronized_backward_pass_of_other_weights_is_refused(ranks: Pool) -> None:
    assert "backward() inside weights()" in str(ranks.error(train_what_is_shown_unsynchronized, 2))


@pytest.mark.parametrize(
    ("engine", "config"),
    rest_slow(
        [
            *((engine, {}) for engine in ("plain", "ddp", "fsdp2", *flattened.ENGINES, *zero.ENGINES)),
            ("plain", CLIPPED),
            ("fsdp2", CLIPPED),
        ],
        lambda engine, _: engine in EACH_KIND,
    ),
)
def test_a_backward_pass_of_other_weights_is_refused(ranks: Pool, engine: str, config: dict[str, Any]) -> None:
    size = 1 if engine == "plain" else 2
    assert "backward() inside weights()" in str(ranks.error(train_what_is_shown, size, engine=engine, config=config))


def train_after_a_refusal(engine: str, refused: bool) -> dict[str, torch.Tensor]:
    model, twa = cases.attach(engine, RUN)
    if refused:
        backward(model, models.loss(model, own_part(0)))  # of a step that is abandoned

        def train() -> None:
            with twa.weights("last"):
                backward(model, models.loss(model, own_part(0)))

        assert "backward() inside weights()" in cases.error_text(train)
        if engine == "plain":  # without zero_grad the next step refuses these gradients
            assert "backward() inside weights()" in cases.error_text(twa.step)
        twa.zero_grad()
    cases.one_step(model, twa, 1)
    return cases.gathered(model)


@pytest.mark.parametrize(
    ("engine", "size"), rest_slow([("plain", 1), ("fsdp2", 2), ("fsdp1", 2)], lambda engine, _: engine != "fsdp1")
)
def test_a_step_after_a_refused_backward_pass(ranks: Pool, engine: str, size: int) -> None:
    expected = ranks(train_after_a_refusal, size, engine=engine, refused=False)[0]
    for name, value in ranks(train_after_a_refusal, size, engine=engine, refused=True)[0].items():
        assert torch.equal(value, expected[name]), name
