"""Features of a DeepSpeedEngine: partitions, low-precision copies, checkpoints, and its JSON file."""

import os
import warnings
from collections import Counter
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor, nn

import twa_scale
from tests import models, zero
from tests.grid import rest_slow
from tests.pool import Pool
from tests.ranks import cases
from tests.ranks.cases import Run
from tests.ranks.test_reading import save
from twa_scale import EngineError
from twa_scale.engines import choose_engine

RUN = Run({"groups": "block", "optimizer": {"name": "adamw", "lr": 0.03}}, steps=3)
TWO_STAGES = rest_slow([(engine,) for engine in zero.ENGINES], lambda engine: engine != "zero2")


def judged() -> models.SmallModel:
    return models.build(seed=99, scalar_shape=(1,))


def states() -> list[dict[str, Tensor]]:
    return models.candidates(scalar_shape=(1,))


def one_loss(engine: Any, step: int) -> Tensor:
    return models.loss(engine, models.part(models.batch(step), *cases.where()))


# -- partitions ---------------------------------------------------------------------------------------------------


def layout(engine: str, options: dict[str, Any]) -> dict[str, Any]:
    """Return the spans of this rank, and whether their float32 memory equals that of DeepSpeed."""
    model = zero.wrap(judged(), engine, **options)
    whole = zero.whole(model)
    actual = choose_engine(model)
    agree = all(
        torch.equal(actual.live(s).to(whole[s.name].dtype), whole[s.name].reshape(-1)[s.start : s.stop])
        for s in actual.spans()
    )
    shapes = {name: info.shape for name, info in actual.parameters.items()}
    return {"spans": [(s.name, s.start, s.stop) for s in actual.spans()], "agree": agree, "shapes": shapes}


@pytest.mark.parametrize("engine", zero.ENGINES)
@pytest.mark.parametrize(
    "options",
    [{}, {"bf16": True}, {"zero": {"round_robin_gradients": True, "sub_group_size": 300}}],
    ids=["fp32", "bf16", "round-robin"],
)
def test_spans_cover_every_element_once(ranks: Pool, engine: str, options: dict[str, Any]) -> None:
    shapes = {name: tuple(p.shape) for name, p in judged().named_parameters()}
    for size in (1, 3):
        results = ranks(layout, size, engine=engine, options=options)
        assert all(result["agree"] for result in results)
        assert all(result["shapes"] == shapes for result in results)
        owned = Counter((name, i) for r in results for name, start, stop in r["spans"] for i in range(start, stop))
        assert owned == Counter((n, i) for n, shape in shapes.items() for i in range(torch.Size(shape).numel()))


# -- low-precision copies and persistent parameters ----------------------------------------------------------------


def shown(engine: str, options: dict[str, Any]) -> list[dict[str, Tensor]]:
    """Return the weights that forward passes use after training, inside weights(), and after it."""
    model = zero.wrap(judged(), engine, **options)
    twa = twa_scale.attach(model, states(), RUN.config)
    for step in range(3):  # ZeRO-3 records the order of the modules, and then keeps parameters over a forward pass
        cases.one_step(model, twa, step)
    actual = [zero.whole(model), outputs(model)]
    for which in ("first", "last"):
        with twa.weights(which):
            actual += [zero.whole(model), outputs(model)]
    cases.one_step(model, twa, 3)
    return [*actual, zero.whole(model), outputs(model)]


def outputs(model: Any) -> dict[str, Tensor]:
    model.eval()
    with torch.no_grad():
        logits = model(models.batch(7)["image"], models.batch(7)["text"])
    model.train()
    return {"logits": logits, **{name: buffer.clone() for name, buffer in model.module.named_buffers()}}


@pytest.mark.parametrize(
    ("engine", "threshold"),
    rest_slow(
        [*((engine, 0) for engine in zero.ENGINES), ("zero3", 100), ("zero3", 100_000)],
        lambda engine, threshold: threshold == (100 if engine == "zero3" else 0),
    ),
)
def test_all_ranks_use_the_written_weights(ranks: Pool, engine: str, threshold: int) -> None:
    options: dict[str, Any] = {"zero": {"stage3_param_persistence_threshold": threshold}}
    for actual in ranks(shown, 2, engine=engine, options=options):
        plain = judged()
        plain.eval()
        for weights, output in zip(actual[::2], actual[1::2], strict=True):
            expected = output.pop("logits")
            plain.load_state_dict({**weights, "head.weight": weights["embed.weight"], **output})
            output["logits"] = plain(models.batch(7)["image"], models.batch(7)["text"])
            torch.testing.assert_close(output["logits"], expected, rtol=1e-5, atol=1e-5)
        for which, weights in zip((0, -1), (actual[2], actual[4]), strict=True):
            for name, value in weights.items():
                if name != models.FROZEN:
                    torch.testing.assert_close(value, states()[which][name], rtol=2e-6, atol=1e-6)
        assert not torch.equal(actual[3]["logits"], actual[5]["logits"])
        assert not torch.equal(actual[1]["logits"], actual[7]["logits"])


def masters(engine: str) -> tuple[bool, bool]:
    """Return whether the bf16 copies are the rounded masters, and whether the masters are more precise."""
    model = zero.wrap(judged(), engine, bf16=True)
    twa = twa_scale.attach(model, states(), RUN.config)
    cases.one_step(model, twa, 0)
    whole = zero.whole(model)
    actual = choose_engine(model)
    trained = [s for s in actual.spans() if actual.parameters[s.name].trainable and len(s)]
    rounded = all(torch.equal(actual.live(s).bfloat16(), whole[s.name].reshape(-1)[s.start : s.stop]) for s in trained)
    finer = any(not torch.equal(actual.live(s), actual.live(s).bfloat16().float()) for s in trained)
    return rounded, finer and all(actual.live(s).dtype == torch.float32 for s in trained)


@pytest.mark.parametrize("engine", zero.ENGINES)
def test_bfloat16_copies_are_rounded_from_float32_masters(ranks: Pool, engine: str) -> None:
    assert ranks(masters, 2, engine=engine) == [(True, True)] * 2


# -- gradients ----------------------------------------------------------------------------------------------------


def memory(engine: str, accumulate: int) -> dict[str, Any]:
    """Return the number of elements of optimizer state and of whole gradients after each half of a step."""
    model = zero.wrap(judged(), engine, accumulate)
    twa = twa_scale.attach(model, states(), RUN.config)
    seen = []
    for step in range(2 * accumulate):
        model.backward(one_loss(model, step))
        seen.append(whole_gradients(model))
        twa.step()
        twa.zero_grad()
        seen.append(whole_gradients(model))
    state = sum(v.numel() for s in model.optimizer.optimizer.state.values() for v in s.values() if torch.is_tensor(v))
    counters = (model.micro_steps, model.global_steps)
    return {"seen": seen, "state": state, "counters": counters}


def whole_gradients(model: Any) -> int:
    return sum(p.grad.numel() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize(
    ("engine", "accumulate"), rest_slow(product(zero.ENGINES, [1, 3]), lambda _, accumulate: accumulate == 3)
)
def test_state_and_gradients_are_freed(ranks: Pool, engine: str, accumulate: int) -> None:
    for result in ranks(memory, 2, engine=engine, accumulate=accumulate):
        assert result["state"] == 0
        assert result["counters"] == (2 * accumulate, 2)
        if engine == "zero1":  # reduces at the boundary: until then every rank has its own gradients
            assert all(elements == 0 for elements in result["seen"][2 * accumulate - 1 :: 2 * accumulate])
        else:
            assert not any(result["seen"])


def stem_loss(model: Any, step: int) -> Tensor:
    image = models.part(models.batch(step), *cases.where())["image"]
    token: Tensor = model.module.stem(image)
    return token.square().mean()


class StemOnly(nn.Module):
    """A model whose forward pass can use some of its parameters only."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = judged()

    def forward(self, image: Tensor, tokens: Tensor, part: bool) -> Tensor:
        y: Tensor = self.inner.stem(image) if part else self.inner(image, tokens)
        return y.square().mean()


def switch(engine: str, parts: list[bool]) -> Tensor:
    """Make steps of which some use only the stem. Return the coefficients, with one column per tensor."""
    model: Any = StemOnly()
    stored = [{f"inner.{name}": value for name, value in state.items()} for state in states()]
    if engine in zero.ENGINES:
        model = zero.wrap(model, engine)
    twa = twa_scale.attach(model, stored, {"groups": "tensor", "optimizer": {"name": "sgd", "lr": 0.1}})
    for step, part in enumerate(parts):
        data = models.part(models.batch(step), *cases.where())
        loss = model(data["image"], data["text"], part)
        model.backward(loss) if engine in zero.ENGINES else loss.backward()
        twa.step()
        twa.zero_grad()
    return twa.coefficients


@pytest.mark.parametrize("engine", TWO_STAGES)
def test_unused_parameter_has_no_stale_gradient(ranks: Pool, engine: str) -> None:
    parts = [False, True, True, False]
    expected = ranks(switch, 2, engine="plain", parts=parts)[0]
    for a in ranks(switch, 2, engine=engine, parts=parts):
        torch.testing.assert_close(a, expected, rtol=1e-4, atol=1e-6)


# -- checkpoints --------------------------------------------------------------------------------------------------


def checkpoint(engine: str, directory: Path, bf16: bool) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Train, save with DeepSpeed, and load in a new engine. Return the float32 average and the loaded weights."""
    model = zero.wrap(judged(), engine, bf16=bf16)
    twa = twa_scale.attach(model, states(), RUN.config)
    for step in range(3):
        cases.one_step(model, twa, step)
    twa.export(directory / "export")
    model.save_checkpoint(str(directory / "deepspeed"))
    fresh = zero.wrap(judged(), engine, bf16=bf16)
    fresh.load_checkpoint(str(directory / "deepspeed"))
    return zero.whole(model), zero.whole(fresh)


@pytest.mark.parametrize(
    ("engine", "bf16"),
    rest_slow(product(zero.ENGINES, [False, True]), lambda engine, bf16: bf16 == (engine == "zero3")),
)
def test_a_deepspeed_checkpoint_holds_the_average(ranks: Pool, tmp_path: Path, engine: str, bf16: bool) -> None:
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    for model, fresh in ranks(checkpoint, 2, engine=engine, directory=tmp_path, bf16=bf16):
        assert all(torch.equal(fresh[name], value) for name, value in model.items())
    exported = load_file(tmp_path / "export" / "model.safetensors")
    merged = get_fp32_state_dict_from_zero_checkpoint(str(tmp_path / "deepspeed"))
    assert (tmp_path / "deepspeed" / "latest").read_text() == "global_step3"
    for name, _ in judged().named_parameters():
        if name == models.FROZEN:  # has no float32 copy, and zero_to_fp32 omits it in what ZeRO-1 saved
            assert engine == "zero1" or torch.equal(merged[name], exported[name].to(merged[name].dtype))
        else:
            assert torch.equal(merged[name], exported[name]), name


def snapshots(engine: str, directory: Path) -> dict[str, Tensor]:
    """Train with Adam in bf16, and write candidates."""
    net = judged()
    optimizer = torch.optim.AdamW((p for p in net.parameters() if p.requires_grad), lr=1e-3)
    model = zero.wrap(net, engine, bf16=True, optimizer=optimizer)
    writer = twa_scale.Snapshots(directory, every_n_steps=2)
    for step in range(4):
        model.backward(one_loss(model, step))
        model.step()
        writer.step(model, step + 1)
    try:
        twa_scale.attach(model, states())
    except EngineError as error:
        assert "AdamW" in str(error) and "stateless_optimizer" in str(error)
    else:
        raise AssertionError("moments of size D were left in place")
    return zero.whole(model)


@pytest.mark.parametrize("engine", zero.ENGINES)
def test_snapshots_of_a_run_with_adam_hold_the_float32_masters(ranks: Pool, tmp_path: Path, engine: str) -> None:
    whole = ranks(snapshots, 2, engine=engine, directory=tmp_path)[0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000002", "step-00000004"]
    stored = load_file(tmp_path / "step-00000004" / "model.safetensors")
    for name, value in whole.items():
        assert torch.equal(stored[name].bfloat16(), value), name
    assert stored["embed.weight"].dtype == torch.float32


# -- settings ------------------------------------------------------------------------------------------------------


def attach_with(engine: str, options: dict[str, Any]) -> None:
    twa_scale.attach(zero.wrap(judged(), engine, **options), states())


@pytest.mark.parametrize(
    ("engine", "options", "message"),
    [
        ("zero0", {}, "stage"),
        ("zero1", {"bf16": True, "data_types": {"grad_accum_dtype": "fp32"}}, "grad_accum_dtype"),
        ("zero1", {"prescale_gradients": True}, "prescale_gradients"),
        ("zero3", {"managed_gradient_accumulation": False}, "managed_gradient_accumulation"),
        ("zero3", {"zero": {"zero_hpz_partition_size": 2}}, "zero_hpz_partition_size"),
        ("zero2", {"zero": {"offload_optimizer": {"device": "cpu"}}, "zero_force_ds_cpu_optimizer": False}, "offload"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_unsupported_settings_are_refused(ranks: Pool, engine: str, options: dict[str, Any], message: str) -> None:
    error = ranks.error(attach_with, 2, engine=engine, options=options)
    assert isinstance(error, EngineError) and message in str(error), error


def misuse(engine: str) -> list[str]:
    model = zero.wrap(judged(), engine, gradient_clipping=0.5)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        twa = twa_scale.attach(model, states(), RUN.config)
    messages = [str(w.message) for w in caught if "gradient_clipping" in str(w.message)]
    for act in (lambda: attach_again(model), twa.step, lambda: step_too(model, twa), lambda: twice(model, twa)):
        try:
            act()
        except EngineError as error:
            messages.append(str(error))
        else:
            messages.append("")
        twa.zero_grad()
    cases.one_step(model, twa, 0)
    try:
        twa_scale.attach(model.module, states())
    except EngineError as error:
        messages.append(str(error))
    return messages


def attach_again(model: Any) -> None:
    twa_scale.attach(model, states(), RUN.config)


def step_too(model: Any, twa: Any) -> None:
    model.backward(one_loss(model, 0))
    model.step()
    twa.step()


def twice(model: Any, twa: Any) -> None:
    for step in range(2):
        model.backward(one_loss(model, step))
    twa.step()


@pytest.mark.parametrize("engine", TWO_STAGES)
def test_misuse_is_refused(ranks: Pool, engine: str) -> None:
    """ZeRO-3 adds up the gradients of backward passes that were not declared; ZeRO-1 and 2 would drop all but one."""
    results = ranks(misuse, 2, engine=engine)
    clipping, *same = results[0]
    assert "max_grad_norm" in clipping and results[1] == same
    repeated, without, stepped, undeclared = same[:4]
    assert "close()" in repeated
    assert "engine.backward" in without and "engine.step" in stepped
    assert ("gradient_accumulation_steps" in undeclared) == (engine != "zero3")
    if engine == "zero3":
        assert "deepspeed.initialize" in same[4]


def attach_from_json(paths: list[str], block: dict[str, Any]) -> tuple[Tensor, str]:
    model = zero.wrap(judged(), "zero2", twa={"candidates": paths, **block})
    twa = twa_scale.attach(model)
    return twa.coefficients, twa.config.groups  # type: ignore[return-value]


def test_settings_in_the_deepspeed_configuration(ranks: Pool, tmp_path: Path) -> None:
    paths = [str(path) for path in save(tmp_path, states())]
    block = {"groups": "block", "center": "last", "steps": 5, "task": {"name": "of a whole run"}}
    a, groups = ranks(attach_from_json, 2, paths=paths, block=block)[0]
    assert groups == "block" and a.shape == (models.NUM_CANDIDATES, 5)
    assert torch.equal(a[-1], torch.ones(5, dtype=a.dtype))
    error = ranks.error(attach_from_json, 2, paths=paths, block={"grops": "block"})
    assert "grops" in str(error) and "groups" in str(error)


# -- loss scale ----------------------------------------------------------------------------------------------------


def scaled(engine: str, set_fault: bool) -> dict[str, Any]:
    """Train in fp16 with DeepSpeed's dynamic loss scale. An overflow keeps the weights and lowers the scale.

    DeepSpeed refuses fp16 where the CPU has no instructions for it; torch computes it all the same.
    """
    os.environ["DS_ACCELERATOR"] = "cpu"
    from deepspeed.accelerator import get_accelerator

    get_accelerator().is_fp16_supported = lambda: True
    fp16 = {"enabled": True, "initial_scale_power": 4, "hysteresis": 1, "loss_scale_window": 1000}
    model = zero.wrap(judged(), engine, fp16=fp16, data_types={"buffer_dtype": "fp16"})
    twa = twa_scale.attach(model, states(), RUN.config)
    moved = []
    scales = []
    for step in range(3):
        loss = one_loss(model, step)
        spoiled = set_fault and step == 1 and dist.get_rank() == 0
        model.backward(loss * float("inf") if spoiled else loss)
        moved.append(twa.step())
        twa.zero_grad()
        scales.append(model.optimizer.loss_scale)
    return {"moved": moved, "scales": scales, "a": twa.coefficients}


@pytest.mark.parametrize("engine", TWO_STAGES)
def test_gradients_are_unscaled(ranks: Pool, engine: str) -> None:
    unscaled = ranks(cases.train, 2, engine="plain", run=RUN)[0].coefficients
    for result in ranks(scaled, 2, engine=engine, set_fault=False):
        assert result["moved"] == [True] * 3
        torch.testing.assert_close(result["a"], unscaled, rtol=0.05, atol=0.01)
    for result in ranks(scaled, 2, engine=engine, set_fault=True):
        assert result["moved"] == [True, False, True]
        assert result["scales"] == [16, 8, 8]
        assert bool(result["a"].isfinite().all())
