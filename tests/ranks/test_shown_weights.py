"""`weights(which)` sets the requested weights, and restores the previous ones with the same bits."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import twa_scale
from tests import flattened, models
from tests.grid import rest_slow
from tests.old_torch import OLD
from tests.pool import Pool
from tests.ranks import cases
from tests.ranks.cases import Run
from twa_scale import TwaError
from twa_scale.errors import RankError
from twa_scale.ranks import set_collective_timeout

N = models.NUM_CANDIDATES
GROUPS = ["stem", "embed", "embed_mix", "blocks.0", "blocks.1"]  # of `block`, in the order of the model
BY_GROUP = torch.randn(N, len(GROUPS), generator=torch.Generator().manual_seed(3), dtype=torch.float64)
SHOWN: dict[str, Any] = {
    "mean": "mean",
    "center": "center",
    "first": "first",
    "last": "last",
    "index": 2,
    "negative-index": -2,
    "ema": "ema:0.5",
    "vector": [0.7, -0.4, 0.5, 0.2],
    "vector-of-another-sum": [0.1, 0.2, 0.3, 0.1],
    "matrix": BY_GROUP / BY_GROUP.sum(0),
    "trained": "trained",
}
BATCHNORM = "stem.norm.running_mean"


def coefficients(which: str) -> Tensor:
    """Return the n x G averaging coefficients of each name. The center is ema:0.5."""
    rows = {"first": 0, "last": N - 1, "index": 2, "negative-index": N - 2}
    if which in rows:
        return torch.eye(N, dtype=torch.float64)[rows[which], :, None].expand(N, len(GROUPS))
    if which in ("mean", "center", "ema"):
        decay = torch.tensor([1.0 if which == "mean" else 0.5 ** (N - 1 - i) for i in range(N)], dtype=torch.float64)
        return (decay / decay.sum())[:, None].expand(N, len(GROUPS))
    a = torch.as_tensor(SHOWN[which], dtype=torch.float64)
    return a if a.ndim == 2 else a[:, None].expand(N, len(GROUPS))


class BlockError(Exception):
    """Raised inside the context."""


def show(engine: str, basis: str) -> dict[str, Any]:
    """Train, then read the weights before, inside and after each context that an exception leaves."""
    run = Run({"basis": basis, "groups": "block", "center": "ema:0.5"})
    model, twa = cases.attach(engine, run)
    for step in range(3):
        cases.one_step(model, twa, step)
    rank, size = cases.where()
    result: dict[str, Any] = {"before": everything(model), "inside": {}, "after": {}}
    for name, which in SHOWN.items():
        try:
            with twa.weights(which):
                result["inside"][name] = cases.gathered(model)
                models.loss(
                    model, models.part(models.batch(77), rank, size)
                )  # in training mode, which changes BatchNorm
                raise BlockError
        except BlockError:
            result["after"][name] = everything(model)
    with twa.weights("last"):
        with twa.weights("first"):
            pass
        result["nested"] = cases.gathered(model)
    cases.one_step(model, twa, 3)
    result["went on"] = cases.gathered(model)
    return result


def everything(model: Any) -> dict[str, Tensor]:
    buffers = {flattened.plain(name): value.clone() for name, value in model.named_buffers()}
    return cases.gathered(model) | buffers


def trained_without_looking(engine: str, basis: str) -> dict[str, Tensor]:
    return cases.train(engine, Run({"basis": basis, "groups": "block", "center": "ema:0.5"}, steps=4)).weights


PLACES = [
    ("plain", 1, "normalized"),
    ("plain", 2, "pca"),
    ("ddp", 2, "orthonormal"),
    ("fsdp2", 1, "simplex"),
    ("fsdp2", 3, "normalized"),
    ("fsdp2", 3, "orthonormal"),
    ("fsdp2-tp", 2, "pca"),
    ("hsdp", 4, "simplex"),
    ("fsdp1", 2, "orthonormal"),
    ("fsdp1-flat", 3, "normalized"),
    ("sharded-ddp", 2, "normalized"),
    ("zero1", 2, "pca"),
    ("zero2", 3, "orthonormal"),
    ("zero3", 3, "normalized"),
]
SHOWN_QUICKLY = [*PLACES[1:5], ("zero3", 3, "normalized")]


@pytest.mark.parametrize(("engine", "size", "basis"), rest_slow(PLACES, lambda *place: place in SHOWN_QUICKLY))
def test_weights_are_shown_and_restored(ranks: Pool, engine: str, size: int, basis: str) -> None:
    states = models.candidates()
    straight = ranks(trained_without_looking, size, engine=engine, basis=basis)
    for result, undisturbed in zip(ranks(show, size, engine=engine, basis=basis), straight, strict=True):
        for name, weights in result["inside"].items():
            for tensor, value in weights.items():
                if tensor == models.FROZEN:
                    continue
                if name == "trained":
                    assert torch.equal(value, result["before"][tensor])
                    continue
                column = next(i for i in reversed(range(len(GROUPS))) if tensor.startswith(GROUPS[i] + "."))
                a = coefficients(name)[:, column]
                expected = sum(a_i * state[tensor].double() for a_i, state in zip(a, states, strict=True))
                assert isinstance(expected, Tensor)
                assert (value.double() - expected).norm() <= 2e-6 * expected.norm(), (name, tensor)
        for name, after in result["after"].items():
            for tensor, value in result["before"].items():
                assert torch.equal(after[tensor], value), f"{tensor} is not what it was before {name}"
        for tensor, value in result["inside"]["last"].items():
            assert torch.equal(result["nested"][tensor], value), f"{tensor} is not restored inside the outer context"
        for tensor, value in undisturbed.items():
            assert torch.equal(result["went on"][tensor], value), f"looking has changed how {tensor} is trained"


def test_an_export_names_the_coefficients_of_what_it_writes(tmp_path: Path) -> None:
    model, twa = cases.attach("plain", Run({"groups": "block"}))
    cases.one_step(model, twa, 0)
    for which in ("trained", "last"):
        with twa.weights(which):
            twa.export(tmp_path / which)
    written = {
        w: json.loads((tmp_path / w / "twa_scale.json").read_text())["coefficients"] for w in ("trained", "last")
    }
    assert written == {"trained": twa.coefficients.tolist(), "last": coefficients("last").tolist()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_named_weights_are_not_rounded_to_the_default_type(dtype: torch.dtype) -> None:
    """A third has more bits than float32. Coefficients equal to those of the center give its exact weights."""
    model = nn.Linear(300, 5)
    states = [{name: torch.randn_like(p) for name, p in model.named_parameters()} for _ in range(3)]
    twa = twa_scale.attach(model, states, {"store": "packed4", "center": "mean"})
    center = cases.gathered(model)
    torch.set_default_dtype(dtype)
    try:
        with twa.weights("mean"):
            assert all(torch.equal(value, center[name]) for name, value in cases.gathered(model).items())
        with twa.weights([1 / 3] * 3):
            assert all(torch.equal(value, center[name]) for name, value in cases.gathered(model).items())
    finally:
        torch.set_default_dtype(torch.float32)


# Errors inside the block


class OneRankError(Exception):
    """Raised on one rank only."""


def fail_at_the_end(engine: str) -> tuple[str, dict[str, Tensor], dict[str, Tensor]]:
    """One rank leaves the block with an error when the others are at its end."""
    model, twa = cases.attach(engine, Run({}))
    rank, size = cases.where()
    cases.one_step(model, twa, 0)
    before, message = everything(model), ""
    try:
        with twa.weights("last"):
            models.loss(model, models.part(models.batch(77), rank, size))
            if rank == size - 1:
                raise OneRankError("no more disk space for predictions")
    except (OneRankError, RuntimeError) as error:
        message = str(error)
    after = everything(model)
    cases.one_step(model, twa, 1)
    return message, before, after


@pytest.mark.parametrize(
    ("engine", "size"),
    rest_slow(
        [("fsdp2", 2), ("ddp", 3), ("fsdp1", 2), ("zero3", 2), ("plain", 2), ("hsdp", 4)],
        lambda engine, _: engine in ("fsdp2", "zero3"),
    ),
)
def test_an_error_at_the_end_of_the_block_is_that_of_all_ranks(ranks: Pool, engine: str, size: int) -> None:
    for messages, before, after in ranks(fail_at_the_end, size, engine=engine):
        assert "no more disk space for predictions" in messages
        for name, value in before.items():
            assert torch.equal(after[name], value), name


def fail_in_the_middle(engine: str) -> tuple[str, list[str], float]:
    """The last rank leaves the block with an error. The others start a forward pass, which waits for it."""
    model, twa = cases.attach(engine, Run({}))
    rank, size = cases.where()
    set_collective_timeout(4.0)
    message = ""
    start = time.perf_counter()
    try:
        with twa.weights("last"):
            if rank == size - 1:
                raise OneRankError("cannot decode picture 17")
            models.loss(model, models.part(models.batch(77), rank, size))
    except (OneRankError, RankError) as error:
        message = f"{type(error).__name__}: {error}"
    seconds = time.perf_counter() - start
    uses = {"step": twa.step, "export": lambda: twa.export("never-written"), "zero_grad": twa.zero_grad}
    refused = [cases.error_text(use) for use in uses.values()]
    twa.close()
    return message, refused, seconds


@pytest.mark.skipif(OLD, reason="torch 2.6 does not change the time limit of a gloo group that exists")
@pytest.mark.parametrize("engine", ["fsdp2", pytest.param("zero3", marks=pytest.mark.slow)])
def test_an_error_in_the_middle_of_the_block_ends_the_average(ranks: Pool, engine: str) -> None:
    (waited, *other), (failed, *own) = ranks(fail_in_the_middle, 2, engine=engine)
    assert failed == "OneRankError: cannot decode picture 17"
    expected = f"RankError: rank 0 could not complete a collective: rank 1 failed ({failed})"
    assert waited.startswith(expected)
    for refused, seconds in (other, own):
        assert all("could not restore the trained weights" in text for text in refused) and seconds < 30


def show_different() -> tuple[str, bool]:
    model, twa = cases.attach("fsdp2", Run({}))
    before = everything(model)
    which: Any = "last" if cases.where()[0] else [0.7, 0.1, 0.1, 0.1]

    def look() -> None:
        with twa.weights(which):
            raise AssertionError

    messages = cases.error_text(look)
    return messages, all(torch.equal(value, before[name]) for name, value in everything(model).items())


def test_ranks_that_show_different_weights_are_refused(ranks: Pool) -> None:
    (messages, kept), other = ranks(show_different, 2)
    assert (messages, kept) == other and kept and "weights(which): rank 1 has 'last'" in messages


def test_refused_calls_inside_weights() -> None:
    model, twa = cases.attach("plain", Run({}))
    cases.one_step(model, twa, 0)
    state = twa.state_dict()
    with twa.weights("last"):
        models.loss(model, models.batch(5))  # changes BatchNorm
        assert not torch.equal(model.get_buffer(BATCHNORM), state["buffers"][BATCHNORM])
        assert torch.equal(twa.state_dict()["buffers"][BATCHNORM], state["buffers"][BATCHNORM])
        for name, use in {"load_state_dict": lambda: twa.load_state_dict(state), "close": twa.close}.items():
            with pytest.raises(TwaError, match=rf"{name}\(\) inside weights\(\)"):
                use()
    cases.one_step(model, twa, 1)
