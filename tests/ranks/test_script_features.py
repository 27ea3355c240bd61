"""Other features of training scripts with every engine: the weights equal those of the reference."""

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import fully_shard
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import twa_scale
from tests import meshes, models, reference, zero
from tests.grid import rest_slow
from tests.pool import Pool
from tests.ranks import cases
from tests.ranks.cases import Run
from twa_scale import EngineError
from twa_scale.base.names import without_wrappers
from twa_scale.engines.zero import is_deepspeed

ENGINES = {"plain": 1, "ddp": 2, "fsdp2": 2, "fsdp2-tp": 2, "fsdp1": 2, "fsdp1-flat": 2, "sharded-ddp": 2}
ENGINES |= dict.fromkeys(zero.ENGINES, 2)  # the number of ranks
RUN = Run({"groups": "block"}, steps=3)
Change = Callable[[Any], Any]


def wrap_blocks(model: Any) -> Any:
    """Apply activation checkpointing with wrappers, which add a prefix to names of parameters."""
    model.blocks = nn.ModuleList(checkpoint_wrapper(block) for block in model.blocks)
    return model


def recompute_blocks(model: Any) -> Any:
    """Apply activation checkpointing inside the model."""
    for block in model.blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    return model


def compile_blocks(model: Any) -> Any:
    compiled: list[Any] = [torch.compile(block, backend="aot_eager") for block in model.blocks]
    model.blocks = nn.ModuleList(compiled)
    return model


def compile_all(model: Any) -> Any:
    if is_deepspeed(model):
        model.compile(backend="aot_eager")
        return model
    return torch.compile(model, backend="aot_eager")


def freeze_a_block(model: Any) -> Any:
    model.blocks[0].requires_grad_(False)
    return model


def leave_a_block_out(model: Any) -> Any:
    model.blocks[1].forward = lambda x: x
    return model


def autocast(model: Any) -> Any:
    """Use autocast in the forward pass only, because its casts of the weights live as long as the context."""
    model.forward = torch.autocast("cpu", torch.bfloat16)(model.forward)
    return model


def compile_a_norm(model: Any) -> Any:
    model.blocks[1].norm2.compile()  # by inductor, which takes longer
    return model


def same(model: Any) -> Any:
    return model


CHANGES: dict[str, tuple[Change, Change]] = {  # before and after the model is wrapped
    "nothing": (same, same),
    "checkpoint-wrapper": (wrap_blocks, same),
    "checkpoint": (recompute_blocks, same),
    "frozen": (freeze_a_block, same),
    "unused": (leave_a_block_out, same),
    "compiled-before": (lambda model: compile_blocks(wrap_blocks(model)), same),
    "compiled-after": (same, compile_all),
}
ONCE: dict[str, tuple[Change, Change]] = {"autocast": (autocast, same), "inductor": (compile_a_norm, same)}


UNSUPPORTED = {  # not supported by torch or the library itself
    # it uses names and recreates frozen parameters, and compiled norms do not accept its DTensors
    "fsdp2-tp": ["checkpoint-wrapper", "frozen", "compiled-before", "compiled-after"],
    "sharded-ddp": ["compiled-after"],
    "zero3": ["compiled-before"],
}
# Compilation takes seconds. zero3 takes half a minute, because DeepSpeed's hooks break the graph at every module.
QUICK_TO_COMPILE = {"compiled-before": ["fsdp2"], "compiled-after": ["plain", "fsdp1-flat"]}
TRIED = {  # every engine with checkpointing, and with tensors that have no gradient
    "nothing": ["plain"],
    "checkpoint-wrapper": ["plain", "ddp", "fsdp2", "fsdp1-flat", "zero2"],
    "checkpoint": ["fsdp2-tp", "fsdp1", "sharded-ddp", "zero1", "zero3"],
    "frozen": ["plain", "ddp", "fsdp2", "fsdp1-flat", "zero3"],
    "unused": ["ddp", "fsdp2-tp", "fsdp1", "sharded-ddp", "zero1", "zero2"],
}
CASES = rest_slow(
    ((engine, change) for engine in ENGINES for change in CHANGES if change not in UNSUPPORTED.get(engine, [])),
    lambda engine, change: engine in (QUICK_TO_COMPILE | TRIED).get(change, ENGINES),
)


def train(engine: str, change: str) -> tuple[dict[str, Tensor], Tensor, float]:
    """Train; return the weights, the coefficients, and the loss of the last candidate on this rank's data."""
    before, after = (CHANGES | ONCE)[change]
    torch._dynamo.reset()
    shape = (1,) if engine in zero.ENGINES else ()
    model: Any = before(models.build(seed=99, scalar_shape=shape))
    if engine == "ddp":
        static = change == "checkpoint"
        model = DistributedDataParallel(model, find_unused_parameters=change == "unused", static_graph=static)
    else:
        model = models.wrap(model, engine)
    model = after(model)
    twa = twa_scale.attach(model, models.candidates(scalar_shape=shape), RUN.config)
    for step in range(RUN.steps):
        cases.one_step(model, twa, step)
    with twa.weights("last"):
        last = models.loss(model, models.part(models.batch(70), *meshes.data_place(model, *cases.where()))).item()
    weights = cases.gathered(getattr(model, "_orig_mod", model))
    plain = without_wrappers(weights)
    return {plain[name]: value for name, value in weights.items()}, twa.coefficients, last


@cache
def expected(change: str, size: int, shape: tuple[int, ...]) -> reference.Trained:
    before = CHANGES[change][0] if change in ("frozen", "unused") else same
    steps = [cases.micro_batches(step, size) for step in range(RUN.steps)]
    model, states = before(models.build(scalar_shape=shape)), models.candidates(scalar_shape=shape)
    return reference.train(model, models.loss, states, RUN.config, steps)


def loss_of_the_last(change: str, rank: int, size: int) -> float:
    """Compute the reference on the whole model. Frozen tensors have their mean."""
    model = CHANGES[change][0](models.build()) if change in ("frozen", "unused") else models.build()
    states = models.candidates()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(states[-1][name] if p.requires_grad else torch.stack([state[name] for state in states]).mean(0))
    return models.loss(model, models.part(models.batch(70), rank, size)).item()


@pytest.mark.parametrize(("engine", "change"), CASES)
def test_changes_of_the_model_do_not_change_results(ranks: Pool, engine: str, change: str) -> None:
    size = ENGINES[engine]
    data = meshes.data_ranks(engine, size)
    target = expected(change, data, (1,) if engine in zero.ENGINES else ()).weights[-1]
    results = ranks(train, size, engine=engine, change=change)
    for rank, (weights, a, last) in enumerate(results):
        assert weights.keys() == target.keys()
        for name, value in target.items():
            assert (weights[name].double() - value).norm() <= 1e-5 * value.norm(), name
        assert torch.equal(a, results[0][1])
        assert abs(last - loss_of_the_last(change, rank % data, data)) <= 1e-5, "the graph has not seen other weights"


def show_after_a_forward(engine: str) -> float:
    """Wrap a model that is compiled as a whole; return the loss of the last candidate, after one of the mean."""
    torch._dynamo.reset()
    model: Any = torch.compile(models.build(seed=99, scalar_shape=(1,)), backend="eager")
    if engine == "fsdp2":
        fully_shard(model)  # the root keeps gathered weights until it is resharded
    else:
        model = models.wrap(model, engine)
    twa = twa_scale.attach(model, models.candidates(scalar_shape=(1,)), RUN.config)
    data = models.part(models.batch(70), *cases.where())
    with torch.no_grad():
        models.loss(model, data)
        with twa.weights("last"):
            return models.loss(model, data).item()


@pytest.mark.parametrize(
    "engine",
    rest_slow(
        [("ddp",), ("fsdp2",), ("fsdp1",), ("fsdp1-flat",), ("sharded-ddp",)],
        lambda engine: engine == "fsdp2",
    ),
)
def test_wrapper_around_a_compiled_model_is_kept(ranks: Pool, engine: str) -> None:
    for rank, loss in enumerate(ranks(show_after_a_forward, 2, engine=engine)):
        assert abs(loss - loss_of_the_last("nothing", rank, 2)) <= 1e-5


@pytest.mark.slow
def test_compiled_model_uses_the_written_weights(ranks: Pool) -> None:
    target = expected("nothing", 2, ()).weights[-1]
    for weights, _, _ in ranks(train, 2, engine="fsdp2", change="inductor", timeout=200):
        for name, value in target.items():
            assert (weights[name].double() - value).norm() <= 1e-5 * value.norm(), name


@pytest.mark.parametrize(
    "engine",
    rest_slow(
        [("plain",), ("ddp",), ("fsdp2",), ("fsdp1",), ("sharded-ddp",)],
        lambda engine: engine in ("plain", "fsdp2", "fsdp1"),
    ),
)
def test_bfloat16_computation_keeps_float32_weights(ranks: Pool, engine: str) -> None:
    size = ENGINES[engine]
    target = expected("nothing", size, ()).weights[-1]
    for weights, _, _ in ranks(train, size, engine=engine, change="autocast"):
        for name, value in target.items():
            assert weights[name].dtype == torch.float32
            assert (weights[name].double() - value).norm() <= 3e-2 * value.norm(), name


SGD = Run({"groups": "block", "max_grad_norm": 0.5, "optimizer": {"name": "sgd", "lr": 0.05}})
SCALERS: dict[str, Any] = {
    "GradScaler": torch.amp.GradScaler,
    # its default is the process group that existed when torch was imported
    "ShardedGradScaler": lambda device, **kwargs: ShardedGradScaler(device, process_group=dist.group.WORLD, **kwargs),
}


def scale(engine: str, scaler: str) -> tuple[dict[str, Tensor], Tensor, list[bool], list[float]]:
    """Train four steps, the second of which overflows on the last rank, or without it and its scaler."""
    model, twa = cases.attach(engine, SGD)
    rank, size = cases.where()
    place = meshes.data_place(model, rank, size)
    scaling = SCALERS[scaler]("cpu", init_scale=1024.0) if scaler else None
    moved, scales = [], []
    for step in range(4):
        loss = models.loss(model, models.part(models.batch(step), *place))
        if scaling is None:
            if step != 1:
                loss.backward()
                twa.step()
        else:
            overflow = float("inf") if step == 1 and rank == size - 1 else 1.0
            scaling.scale(loss * overflow).backward()
            before = twa.coefficients
            moved.append(twa.step(scaling))
            assert moved[-1] != torch.equal(before, twa.coefficients)
            scaling.update()
            scales.append(scaling.get_scale())
        twa.zero_grad()
    return cases.gathered(model), twa.coefficients, moved, scales


@pytest.fixture(scope="module")
def not_scaled(ranks: Pool) -> Callable[[str], tuple[dict[str, Tensor], Tensor]]:
    """Return the weights and coefficients of an engine that is trained without a scaler; made once."""
    return cache(lambda engine: ranks(scale, ENGINES[engine], engine=engine, scaler="")[0][:2])


SCALED = [
    (engine, scaler) for engine in ("plain", "ddp", "fsdp2", "fsdp2-tp", "fsdp1", "sharded-ddp") for scaler in SCALERS
]


@pytest.mark.parametrize(
    ("engine", "scaler"),
    rest_slow(
        SCALED,
        lambda engine, scaler: (scaler == "GradScaler" and engine not in ("ddp", "fsdp2-tp")) or engine == "fsdp2",
    ),
)
def test_scaled_losses_give_the_same_weights_and_skip_overflows(
    ranks: Pool, not_scaled: Callable[[str], tuple[dict[str, Tensor], Tensor]], engine: str, scaler: str
) -> None:
    """This includes clipping, which has to come after unscaling."""
    size = ENGINES[engine]
    target, a = not_scaled(engine)
    for weights, coefficients, moved, scales in ranks(scale, size, engine=engine, scaler=scaler):
        assert moved == [True, False, True, True] and scales == [1024, 512, 512, 512]
        torch.testing.assert_close(coefficients, a, rtol=1e-5, atol=1e-6)
        for name, value in target.items():
            torch.testing.assert_close(weights[name], value, rtol=1e-5, atol=1e-6)


def test_disabled_scaler_does_not_hide_an_overflow() -> None:
    model, twa = cases.attach("plain", SGD)
    (models.loss(model, models.batch(0)) * float("inf")).backward()
    with pytest.raises(twa_scale.TwaError, match="not finite"):
        twa.step(torch.amp.GradScaler("cpu", enabled=False))


@pytest.mark.parametrize("wrap", [nn.DataParallel, lambda model: {"model": model}])
def test_unknown_model_kind_lists_the_supported_kinds(wrap: Change) -> None:
    with pytest.raises(EngineError) as caught:
        twa_scale.attach(wrap(models.build()), models.candidates())
    for known in ("DistributedDataParallel", "fully_shard", "FullyShardedDataParallel", "DTensor", "DeepSpeedEngine"):
        assert known in str(caught.value)
    assert type(wrap(models.build())).__name__ in str(caught.value)
