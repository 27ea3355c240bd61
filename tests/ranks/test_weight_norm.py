"""The gradient of the weights is clipped as torch.nn.utils.clip_grad_norm_ does on one process with whole weights."""

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from tests import flattened, meshes, models, reference, zero
from tests.grid import rest_slow
from tests.pool import Pool
from tests.ranks import cases
from tests.ranks.cases import Run
from twa_scale import ConfigError, TwaError

STEPS = 4
NORM = 10.3
CONFIG = {"groups": "block", "optimizer": {"name": "sgd", "lr": 0.03}, "max_weight_grad_norm": NORM}
ENGINES = ["ddp", "fsdp2", *flattened.ENGINES, *zero.ENGINES]


@cache
def expected(size: int, accumulate: int, shape: tuple[int, ...]) -> reference.Trained:
    steps = [cases.micro_batches(step, size, accumulate) for step in range(STEPS)]
    states = models.candidates(scalar_shape=shape)
    return reference.train(models.build(scalar_shape=shape), models.loss, states, CONFIG, steps)


def train(engine: str, accumulate: int = 1, **config: Any) -> dict[str, Tensor]:
    return cases.train(engine, Run({**CONFIG, **config}, STEPS, accumulate=accumulate)).weights


def require_equal(results: list[dict[str, Tensor]], engine: str, size: int, accumulate: int = 1) -> None:
    target = expected(meshes.data_ranks(engine, size), accumulate, (1,) if engine in zero.ENGINES else ())
    assert min(target.norms) < NORM < max(target.norms), "some steps are clipped, and some are not"
    for weights in results:
        for name, value in target.weights[-1].items():
            assert (weights[name].double() - value).norm() <= 1e-5 * value.norm(), name


@pytest.mark.parametrize(
    ("engine", "size"),
    rest_slow(
        [
            ("plain", 1),
            *((engine, size) for engine in ENGINES for size in (1, 2, 3)),
            ("hsdp", 2),
            ("hsdp", 4),
            ("fsdp2-tp", 4),
        ],
        # The test below has the other engines.
        lambda engine, size: (
            (size == (3 if engine == "fsdp2" else 2) and engine not in ("ddp", "fsdp1", "zero1"))
            or (engine, size) in (("plain", 1), ("hsdp", 4), ("fsdp2-tp", 4))
        ),
    ),
)
def test_every_engine_clips_as_one_process_does(ranks: Pool, engine: str, size: int) -> None:
    require_equal(ranks(train, size, engine=engine), engine, size)


@pytest.mark.parametrize(("engine", "size"), [("plain", 1), ("ddp", 2), ("fsdp2", 2), ("fsdp1", 2), ("zero1", 2)])
def test_the_norm_is_that_of_the_sum_of_backward_passes(ranks: Pool, engine: str, size: int) -> None:
    require_equal(ranks(train, size, engine=engine, accumulate=2), engine, size, 2)


def test_parts_of_a_gradient_are_refused(ranks: Pool) -> None:
    error = ranks.error(train, 2, engine="sharded-ddp", accumulate=2)
    assert isinstance(error, TwaError) and "one backward pass for each step" in str(error)


def test_replicas_that_exchange_only_coefficients_are_refused(ranks: Pool) -> None:
    error = ranks.error(train, 2, engine="plain")
    assert isinstance(error, ConfigError) and "max_weight_grad_norm" in str(error)


def test_a_scaled_gradient_is_clipped_by_its_own_norm() -> None:
    """A gradient that overflows is skipped."""

    def weights(scaling: bool) -> dict[str, Tensor]:
        model, twa = cases.attach("plain", Run(CONFIG))
        scaler = torch.amp.GradScaler("cpu", init_scale=512.0, enabled=scaling)
        for step in range(STEPS):
            loss = models.loss(model, models.batch(step))
            if scaling and step == 1:
                scaler.scale(loss * float("inf")).backward()
                assert not twa.step(scaler)
                twa.zero_grad()
                scaler.update()
            scaler.scale(models.loss(model, models.batch(step))).backward()
            assert twa.step(scaler)
            scaler.update()
        return cases.gathered(model)

    target = weights(scaling=False)
    for name, value in weights(scaling=True).items():
        torch.testing.assert_close(value, target[name], rtol=1e-5, atol=1e-6)
