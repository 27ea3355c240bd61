"""Running averages in one process: names, rounding, errors."""

import io
import json
from collections.abc import Callable
from math import log, prod
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import twa_scale
from twa_scale import ConfigError, EngineError, OutputError, StateError, TwaError, TwaWarning
from twa_scale.running import learning, window
from twa_scale.running.settings import EmaSettings, WindowSettings, is_due

STORES = {"dense32": 1e-5, "dense16": 0.01, "packed8": 0.02, "packed4": 0.2, "packed2": 0.6, "packed1": 0.9}
KEEP = 4


def linear(seed: int = 0) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(50, 70)


def move(model: nn.Module) -> None:
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))


def followed(steps: int, dtype: torch.dtype = torch.float32, **options: Any) -> tuple[Any, nn.Linear, list[Tensor]]:
    """Return averages after some steps of a random walk, and the weights of each step."""
    model = linear().to(dtype)
    averages, seen = twa_scale.RunningAverages(model, **options), []
    for _ in range(steps):
        move(model)
        averages.step()
        seen.append(model.weight.detach().double())
    return averages, model, seen


def shown(averages: Any, model: Any, which: Any) -> Tensor:
    with averages.weights(which):
        weight: Tensor = model.weight.detach().double()
    return weight


@pytest.mark.parametrize(("store", "tolerance"), STORES.items())
@pytest.mark.parametrize("steps", [1, KEEP, 12 * KEEP])
def test_error_of_a_snapshot_is_the_rounding_of_one_increment(store: str, tolerance: float, steps: int) -> None:
    """The error does not grow with the number of snapshots, because it is part of the next increment."""
    averages, model, seen = followed(steps, window={"every": 1, "keep": KEEP, "store": store})
    assert averages.snapshot_steps == [*range(max(steps - KEEP, 0) + 1, steps + 1)]
    for i, expected in enumerate(seen[-KEEP:]):
        error = (shown(averages, model, i) - expected).norm() / (0.1 * 50 * 70**0.5)
        assert error < tolerance
    mean = torch.stack(seen[-KEEP:]).mean(0)
    assert (shown(averages, model, "mean") - mean).norm() / 50 < tolerance


def test_dropping_the_oldest_leaves_the_others_as_they_were() -> None:
    averages, model, _ = followed(KEEP, window={"every": 1, "keep": KEEP, "store": "packed2"})
    before = [shown(averages, model, i) for i in range(KEEP)]
    move(model)
    averages.step()
    for i in range(KEEP - 1):
        torch.testing.assert_close(shown(averages, model, i), before[i + 1], rtol=0, atol=1e-5)


def test_averages_of_constant_weights_are_exact() -> None:
    model = linear()
    averages = twa_scale.RunningAverages(model, window={"every": 1, "keep": 3, "store": "packed1"})
    before = model.weight.detach().clone()
    for _ in range(7):
        averages.step()
    for which in ("mean", 0, -1, [0.5, 0.25, 0.25]):
        assert torch.equal(shown(averages, model, which), before.double())


@pytest.mark.parametrize("every", [1, 3])
def test_bias_correction_leaves_out_the_first_weights(every: int) -> None:
    settings = {"decays": 0.9, "bias_correction": True, "update_every": every, "start_step": 2}
    averages, model, seen = followed(12, ema=settings)
    used = seen[1::every]
    factors = torch.tensor([0.9 ** (len(used) - 1 - i) for i in range(len(used))], dtype=torch.float64)
    expected = torch.tensordot(factors / factors.sum(), torch.stack(used), 1)
    torch.testing.assert_close(shown(averages, model, "ema"), expected, rtol=1e-5, atol=1e-6)


def test_weights_of_few_bits_are_averaged_in_float32() -> None:
    averages, model, seen = followed(200, torch.bfloat16, ema=[0.99])
    average = seen[0]
    for weights in seen[1:]:
        average = 0.99 * average + 0.01 * weights
    before = model.weight.detach().clone()
    torch.testing.assert_close(shown(averages, model, "ema"), average.to(torch.bfloat16).double(), rtol=1e-2, atol=1e-3)
    assert averages.nbytes == 4 * 51 * 70 and torch.equal(model.weight.detach(), before)


def test_half_lives_are_proportional_to_the_age() -> None:
    averages, model, seen = followed(400, ema={"half_life": 0.1})
    expected = seen[0]
    for t, weights in enumerate(seen[1:], 2):
        d = (1 - 1 / t) ** (log(0.5) / log(1 - 0.1))
        expected = d * expected + (1 - d) * weights
    torch.testing.assert_close(shown(averages, model, "ema:half-life:0.1"), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("every", "start"), [(1, 0), (3, 4)])
@pytest.mark.parametrize("options", [True, {"ema_power": 0.7, "bias_power": 0.3, "lag": 2.0, "multiplier": 0.5}])
def test_bema_is_that_of_the_paper(every: int, start: int, options: Any) -> None:
    """Algorithm 1 of arXiv 2508.00180 in float64, with burn-in until the first update, also for buckets of bfloat16."""
    settings = {"decays": 0.9, "bema": options, "update_every": every, "start_step": start}
    inputs = {"ema_power": 0.5, "bias_power": 0.2, "lag": 10.0, "multiplier": 1.0}
    inputs |= {} if options is True else options
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.bfloat16, 2e-2)):
        averages, model, seen = followed(13, dtype, ema=settings)
        first = ema = bema = seen[max(start, 1) - 1]
        for step, weights in list(enumerate(seen, 1))[max(start, 1) :]:
            if (step - start) % every:
                continue
            t = step - max(start, 1)
            base = inputs["lag"] + inputs["multiplier"] * t
            beta, alpha = base ** -inputs["ema_power"], base ** -inputs["bias_power"]
            ema = (1 - beta) * ema + beta * weights
            bema = ema + alpha * (weights - first)
        torch.testing.assert_close(shown(averages, model, "bema"), bema, rtol=tolerance, atol=tolerance)
        assert averages.names == ["last", "ema", "bema"]
        assert averages.nbytes == (4 if dtype == torch.bfloat16 else 8) * 51 * 70 * (1 + 3)


def test_bema_continues_with_the_same_bits() -> None:
    averages, model, _ = followed(5, ema={"bema": True})
    assert averages.names == ["last", "bema"] and not torch.equal(shown(averages, model, "bema"), model.weight.double())
    resumed = twa_scale.RunningAverages(model, ema={"bema": True})
    resumed.load_state_dict(averages.state_dict())
    for instance in (averages, resumed):
        torch.manual_seed(5)
        before = model.weight.detach().clone()
        move(model)
        instance.step()
        with torch.no_grad():
            model.weight.copy_(before)
    assert torch.equal(shown(averages, model, "bema"), shown(resumed, model, "bema"))
    with pytest.raises(ConfigError, match=r"ema:0\.9.* is not kept; this object keeps bema"):
        averages.has("ema:0.9")
    with pytest.raises(ConfigError, match="'ema' is not kept"):
        averages.has("ema")


@pytest.mark.parametrize("half_life", [0.05, 0.3, 0.9])
def test_half_of_the_weight_is_on_the_last_updates(half_life: float) -> None:
    settings, total = EmaSettings(half_life=[half_life]), 1000
    of_the_others = prod(settings.decay(0, t) for t in range(round((1 - half_life) * total) + 1, total + 1))
    assert of_the_others == pytest.approx(0.5, rel=1e-9)


def test_compare_returns_a_table_and_restores_the_weights() -> None:
    averages, model, seen = followed(5, ema=[0.9], window={"every": 1, "keep": 3, "store": "dense32"})
    scores = averages.compare(lambda given: float(given.weight.detach().double().sum()))
    assert list(scores) == averages.names == ["last", "ema", "mean", "minus-sqrt"]
    assert scores["last"] == float(seen[-1].sum()) and scores["mean"] == pytest.approx(
        float(torch.stack(seen[-3:]).sum() / 3)
    )
    assert str(scores).splitlines()[0].split() == ["last", f"{scores['last']:.6g}"]
    assert torch.equal(model.weight.detach().double(), seen[-1])


def test_training_continues_after_learning() -> None:
    averages, model, seen = followed(6, window={"every": 2, "keep": 3})
    twa = averages.learn({"optimizer": {"lr": 0.1}})
    model(torch.randn(8, 50)).square().mean().backward()
    assert twa.step() and twa.rounding.store == "packed1" and averages.nbytes > twa.store_bytes
    assert not torch.equal(model.weight.detach().double(), seen[-1])
    for call in (averages.step, lambda: averages.learn(), lambda: averages.weights("mean").__enter__()):
        with pytest.raises(TwaError, match=r"call restore\(\) first"):
            call()
    averages.restore()
    assert torch.equal(model.weight.detach().double(), seen[-1]) and twa.closed
    move(model)
    averages.step()
    averages.restore()
    assert not torch.equal(model.weight.detach().double(), seen[-1]) and averages.num_steps == 7


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "give ema="),
        ({"ema": []}, "give decays"),
        ({"ema": [1.0]}, "less than 1"),
        ({"ema": "0.9"}, "give decays"),
        ({"ema": {"decay": 0.9, "decays": [0.9]}}, "the same setting"),
        ({"ema": [0.9, 0.9]}, "given once"),
        ({"ema": {"half_live": 0.1}}, "half_life"),
        ({"ema": {"bema": False}}, "or bema, as True"),
        ({"ema": {"bema": {"lag": 0.5}}}, r"bema\.lag: .*greater than or equal to 1"),
        ({"ema": {"bema": {"bias_powr": 0.5}}}, "bias_power"),
        ({"window": {"every": 5}}, "keep"),
        ({"window": {"every": 5, "keep": 1}}, "keep"),
        ({"window": 5}, "window: 5"),
        ({"window": {"every": 1, "keep": 2, "store": "mapped"}}, "store"),
        ({"ema": 0.9, "device": "cuda"}, "'auto' or 'cpu'"),
    ],
)
def test_contradictory_settings_raise(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        twa_scale.RunningAverages(linear(), **options)


@pytest.mark.parametrize(
    ("which", "message"),
    [
        ("ema", "is one of several"),
        ("ema:0.7", "keeps ema:0.9, ema:0.99; window:ema:0.7"),
        ("ema:x", "is not kept"),
        ("lawa:0", "give 1 to 3"),
        ("lawa:4", "give 1 to 3"),
        ("center", "is not an average"),
        ("window:x", "is not an average"),
        (7, "indices 0 to 2"),
        ([0.5, 0.5], r"\(3,\)"),
        ([0.5, 0.5, float("nan")], "finite"),
    ],
)
def test_averages_that_are_not_kept_are_refused(which: Any, message: str) -> None:
    averages, model, seen = followed(3, ema=[0.9, 0.99], window={"every": 1, "keep": 3})
    with pytest.raises(ConfigError, match=message), averages.weights(which):
        pass
    assert torch.equal(model.weight.detach().double(), seen[-1])


@pytest.mark.parametrize("which", ["ema", "mean"])
def test_average_before_the_first_step_raises(which: str) -> None:
    averages, _, _ = followed(2, ema={"decays": [0.9], "start_step": 3}, window={"every": 5, "keep": 3})
    assert averages.names == ["last"] and averages.has("last") and not averages.has(which)
    with pytest.raises(ConfigError, match="is not an average"):
        averages.has("emma")
    with pytest.raises(TwaError, match="yet"), averages.weights(which):
        pass


@pytest.mark.parametrize(("which", "step"), [("ema", 1), ("mean", 1), ("mean", 2)])
def test_averages_of_a_training_that_has_diverged_are_refused(which: str, step: int) -> None:
    model = linear()
    averages = twa_scale.RunningAverages(model, ema=[0.5], window={"every": 1, "keep": 3})
    for i in range(1, 4):
        with torch.no_grad():
            model.bias[3] = torch.inf if i == step else 1.0
        averages.step()
    with pytest.raises(TwaError, match="training has diverged"), averages.weights(which):
        pass


def learn_without_snapshots(averages: Any) -> None:
    averages.learn()


def step_inside(averages: Any) -> None:
    with averages.weights("last"):
        averages.step()


def backward_inside(averages: Any) -> None:
    with averages.weights("ema"):
        averages._model(torch.ones(2, 50)).sum().backward()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (learn_without_snapshots, "the window holds 1"),
        (step_inside, "leave it first"),
        (backward_inside, "not that of the trained weights"),
    ],
)
def test_contradictory_requests_raise(wrong: Callable[[Any], None], message: str) -> None:
    averages, _, _ = followed(3, ema=[0.9], window={"every": 3, "keep": 3})
    with pytest.raises(TwaError, match=message):
        wrong(averages)
    with averages.weights("ema"):
        pass
    averages.step()


@pytest.mark.parametrize(("key", "value"), [("store", "packed4"), ("coding", "center"), ("store", "dense32")])
def test_another_store_than_that_of_the_window_is_refused(key: str, value: str) -> None:
    averages, model, seen = followed(3, window={"every": 1, "keep": 3})
    with pytest.raises(ConfigError, match=f"^{key}: .* the window"):
        averages.learn({key: value})
    assert torch.equal(model.weight.detach().double(), seen[-1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("settings"), "no `settings`"),
        (lambda state: state.update(settings="{"), "damaged"),
        (lambda state: state["ema"]["ema:0.9"]["weights"].popitem(), "the state has no"),
        (lambda state: state.update(more=1), "'more'"),
        (lambda state: state["window"]["order"].fill_(0), "damaged"),
        (lambda state: state["window"].update(steps=torch.zeros(2)), "belongs there"),
    ],
)
def test_states_that_do_not_fit_change_nothing(change: Callable[[Any], object], message: str) -> None:
    averages, model, _ = followed(4, ema=[0.9], window={"every": 1, "keep": 3})
    state = averages.state_dict()
    state["window"] = {
        key: value.clone() if isinstance(value, Tensor) else value for key, value in state["window"].items()
    }
    state["ema"] = {"ema:0.9": {**state["ema"]["ema:0.9"], "weights": dict(state["ema"]["ema:0.9"]["weights"])}}
    before = {which: shown(averages, model, which) for which in ("ema", "mean")}
    change(state)
    with pytest.raises(StateError, match=message):
        averages.load_state_dict(state)
    assert all(torch.equal(shown(averages, model, which), value) for which, value in before.items())


def test_the_state_of_other_settings_is_refused() -> None:
    averages, _, _ = followed(3, ema=[0.9])
    other, _, _ = followed(3, ema=[0.99])
    with pytest.raises(StateError, match=r"saved with ema=.*0\.99"):
        averages.load_state_dict(other.state_dict())


def test_parameters_that_are_trained_later_are_reported() -> None:
    model = nn.Sequential(linear(), linear())
    model[1].requires_grad_(False)
    averages = twa_scale.RunningAverages(model, ema=[0.9])
    averages.step()
    model[1].requires_grad_(True)
    with pytest.warns(TwaWarning, match="2 more parameters"), averages.weights("ema"):
        pass


def test_freezing_one_layer_and_training_another_is_reported() -> None:
    model = nn.Sequential(linear(), linear())
    model[1].requires_grad_(False)
    averages = twa_scale.RunningAverages(model, ema=[0.9])
    averages.step()
    model[0].requires_grad_(False)
    model[1].requires_grad_(True)
    with pytest.warns(TwaWarning, match="2 more parameters"), averages.weights("ema"):
        pass


def raise_interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def raise_out_of_memory(*_: Any) -> None:
    raise torch.OutOfMemoryError("no memory")


@pytest.mark.parametrize("location", ["_measured", "_buffers", "assemble"])
@pytest.mark.parametrize("fail", [raise_interrupt, raise_out_of_memory])
def test_training_continues_after_learn_failed(monkeypatch: Any, location: str, fail: Callable[..., None]) -> None:
    """After any error the weights are restored, none is written later, and no hook receives gradients."""
    averages, model, seen = followed(4, window={"every": 1, "keep": 3, "store": "dense32"})
    work = getattr(learning, location)
    with monkeypatch.context() as patch:
        patch.setattr(learning, location, lambda *args: fail(work(*args)))
        with pytest.raises((KeyboardInterrupt, torch.OutOfMemoryError)):
            averages.learn()
    assert torch.equal(model.weight.detach().double(), seen[-1])
    model(torch.ones(2, 50)).sum().backward()
    assert model.weight.grad is not None
    move(model)
    averages.step()
    before = model.weight.detach().clone()
    shown(averages, model, "mean")
    assert torch.equal(model.weight.detach(), before)
    averages.restore()
    assert torch.equal(model.weight.detach(), before)
    averages.learn()


def test_an_interrupted_update_is_refused_until_a_state_is_loaded(monkeypatch: Any) -> None:
    averages, model, _ = followed(4, window={"every": 1, "keep": 3, "store": "dense32"})
    state = through_a_file(averages.state_dict())
    with monkeypatch.context() as patch:
        patch.setattr(window, "write_row", raise_interrupt)
        with pytest.raises(KeyboardInterrupt):
            averages.step()
    for call in (averages.step, averages.learn, lambda: shown(averages, model, "mean"), lambda: averages.save("out")):
        with pytest.raises(TwaError, match="interrupted an update"):
            call()
    with pytest.warns(TwaWarning, match="interrupted"):
        broken = averages.state_dict()
    with pytest.raises(StateError, match="interrupted"):
        averages.load_state_dict(broken)
    averages.load_state_dict(state)
    averages.step()
    assert averages.snapshot_steps == [3, 4, 5]


def through_a_file(state: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    loaded: dict[str, Any] = torch.load(file, weights_only=True)
    return loaded


def fill(key: str, tensor: str, value: float) -> Callable[[dict[str, Any]], None]:
    def change(state: dict[str, Any]) -> None:
        for name, stored in state["window"][key].items():
            if tensor in name and stored.is_floating_point():
                stored.fill_(value)

    return change


@pytest.mark.parametrize("store", ["dense32", "packed1"])
@pytest.mark.parametrize(
    "change",
    [
        lambda state: state["step"].fill_(-1),
        lambda state: state["step"].fill_(0),
        lambda state: state["step"].fill_(3),  # before the last snapshot
        lambda state: state["ema_updates"].fill_(-3),
        lambda state: state["ema_updates"].fill_(9),
        fill("rows", "weight", float("inf")),
        fill("base", "bias", float("nan")),
    ],
)
def test_damaged_states_are_refused(store: str, change: Callable[[dict[str, Any]], object]) -> None:
    averages, model, _ = followed(4, ema=[0.9], window={"every": 1, "keep": 3, "store": store})
    state = through_a_file(averages.state_dict())
    averages.load_state_dict(state)
    before = shown(averages, model, "mean")
    change(state)
    with pytest.raises(StateError, match="damaged"):
        averages.load_state_dict(state)
    assert averages.num_steps == 4 and torch.equal(shown(averages, model, "mean"), before)


@pytest.mark.parametrize("options", [{"ema": [0.9]}, {"window": {"every": 1, "keep": 3}}])
def test_replaced_parameters_are_refused_at_the_next_step(options: dict[str, Any]) -> None:
    averages, model, _ = followed(2, **options)
    model.load_state_dict({name: value + 1 for name, value in model.state_dict().items()}, assign=True)
    with pytest.raises(EngineError, match="replaced"):
        averages.step()
    assert averages.num_steps == 2


def with_statistics() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7))


def add_buffer(model: nn.Module) -> None:
    model.register_buffer("mask", torch.ones(3))


def remove_buffer(model: nn.Module) -> None:
    del model.get_submodule("1").running_mean


def resize_buffer(model: nn.Module) -> None:
    model.get_submodule("1").running_mean = torch.zeros(9)


@pytest.mark.parametrize("change", [add_buffer, remove_buffer, resize_buffer])
@pytest.mark.parametrize(
    "options", [{"ema": {"decays": 0.9, "use_buffers": True}}, {"window": {"every": 1, "keep": 3}}]
)
def test_buffers_that_become_others_are_refused_by_name(
    options: dict[str, Any], change: Callable[[nn.Module], None]
) -> None:
    model = with_statistics()
    averages = twa_scale.RunningAverages(model, **options)
    averages.step()
    change(model)
    with pytest.raises(EngineError, match=r"buffer '(mask|1\.running_mean)' was"):
        averages.step()


def test_buffers_that_are_not_held_may_become_others() -> None:
    model = with_statistics()
    averages = twa_scale.RunningAverages(model, ema=[0.9])
    add_buffer(model)
    averages.step()
    with averages.weights("ema"):
        model.register_buffer("more", torch.ones(2))


def test_buffers_of_integers_are_held_once() -> None:
    model = with_statistics()
    without = twa_scale.RunningAverages(model, window={"every": 1, "keep": 9}).nbytes
    model.register_buffer("mask", torch.ones(1000, dtype=torch.bool))
    averages = twa_scale.RunningAverages(model, window={"every": 1, "keep": 9})
    assert averages.nbytes == without + 1000
    for i in range(1, 4):
        model.get_buffer("1.num_batches_tracked").fill_(i)
        averages.step()
    stored = averages._window
    assert stored is not None
    assert [int(stored.buffer("1.num_batches_tracked", i)) for i in range(3)] == [1, 2, 3]
    assert stored.buffer("mask", 0).all()


@pytest.mark.parametrize("calls", [2, 4])
def test_more_calls_than_steps_are_reported_once(calls: int) -> None:
    model = linear()
    averages = twa_scale.RunningAverages(model, ema=[0.9])
    with pytest.warns(TwaWarning, match="once, after each step") as messages:
        for _ in range(20):
            move(model)
            for _ in range(calls):
                averages.step()
    assert len(messages) == 1


@pytest.mark.parametrize("write", ["skipped", "unseen"])
def test_steps_without_a_version_are_not_reported(write: str) -> None:
    """A loss scaler skips some steps, and some optimizers write without increasing torch's version counters."""
    model = linear()
    averages = twa_scale.RunningAverages(model, ema=[0.9])
    for i in range(60):
        if write == "unseen":
            model.weight.data += 1
        elif i % 9 >= 2:
            move(model)
        averages.step()


def test_writes_inside_weights_are_reported() -> None:
    averages, model, seen = followed(3, ema=[0.9], window={"every": 1, "keep": 3})
    with averages.weights("ema"), averages.weights("mean"):
        pass
    with pytest.warns(TwaWarning, match="written while an average was shown"), averages.weights("ema"):
        move(model)
    assert torch.equal(model.weight.detach().double(), seen[-1])


def test_names_of_decays_are_distinct() -> None:
    averages, _, _ = followed(2, ema=[0.9999999, 0.99999992])
    assert averages.names[1:] == ["ema:0.9999999", "ema:0.99999992"]
    assert averages.has("ema:0.99999990")
    scores = averages.compare(lambda _: 1.0, ["last", "ema:0.9999999", "last"])
    assert list(scores) == ["last", "ema:0.9999999", "last (2)"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tensors_of_any_number_and_size_are_averaged(monkeypatch: Any, dtype: torch.dtype) -> None:
    """Small tensors are updated together, and large ones in pieces."""
    monkeypatch.setattr("twa_scale.running.ema.PIECE", 100)
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(size, 9) for size in (1, 30, 2, 5, 11, 12))).to(dtype)
    averages = twa_scale.RunningAverages(model, ema=[0.5, 0.9])
    expected = [[p.detach().float()] * 2 for p in model.parameters()]
    for step in range(3):
        move(model)
        averages.step()
        for p, stored in zip(model.parameters(), expected, strict=True):
            stored[:] = [
                w.lerp(p.detach().float(), 1 - d if step else 1) for w, d in zip(stored, (0.5, 0.9), strict=True)
            ]
    for i, name in enumerate(("ema:0.5", "ema:0.9")):
        with averages.weights(name):
            for p, stored in zip(model.parameters(), expected, strict=True):
                assert torch.equal(p, stored[i].to(dtype))


@pytest.mark.parametrize(("which", "from_step"), [([0.2, 0.3, 0.5], 3), (2, 3), (-1, 1), ("2", 3), ("lawa:3", 1)])
def test_average_waits_for_enough_snapshots(which: Any, from_step: int) -> None:
    model = linear()
    averages = twa_scale.RunningAverages(model, window={"every": 1, "keep": 3})
    for step in range(5):
        assert averages.has(which) == (step >= from_step)
        if step < from_step:
            with pytest.raises(TwaError, match=f"{step} of 3"), averages.weights(which):
                pass
        move(model)
        averages.step()
    for never in ([0.5, 0.5], 3, -4, "3"):
        with pytest.raises(ConfigError):
            twa_scale.RunningAverages(model, window={"every": 1, "keep": 3}).has(never)


def test_learning_restores_at_the_end_of_a_block() -> None:
    averages, model, seen = followed(4, window={"every": 1, "keep": 3})
    with pytest.raises(ValueError, match="of the block"), averages.learning() as twa:
        assert not torch.equal(model.weight.detach().double(), seen[-1])
        raise ValueError("of the block")
    assert twa.closed and torch.equal(model.weight.detach().double(), seen[-1])
    averages.step()


def test_an_average_is_written_with_its_description(tmp_path: Path) -> None:
    """Its tensors have the type asked for, which config.json then names. The training can continue."""
    averages, model, seen = followed(4, ema=[0.9], window={"every": 1, "keep": 3, "store": "dense32"})
    config = json.dumps({"architectures": ["Linear"], "dtype": "float32"}).encode()
    out = tmp_path / "out"
    averages.export(out, "mean", dtype=torch.bfloat16, files={"config.json": config})
    mean = torch.stack(seen[1:]).mean(0)
    written = load_file(out / "model.safetensors")["weight"]
    assert written.dtype == torch.bfloat16
    torch.testing.assert_close(written.double(), mean, rtol=2**-8, atol=0)
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"
    origin = json.loads((out / "twa_scale.json").read_text())
    assert origin["asked"] == "mean" and origin["weights"] == pytest.approx([1 / 3] * 3)
    assert "Average of 3 checkpoints" in (out / "README.md").read_text()
    with pytest.raises(OutputError, match="not empty"):
        averages.export(out, "ema")
    averages.export(out, "ema", overwrite=True)
    assert "an exponential average" in (out / "README.md").read_text()
    wrong: dict[type[TwaError], list[dict[str, Any]]] = {
        ConfigError: [{"which": "ema:0.5"}, {"dtype": torch.int8}, {"max_shard_size": "5XB"}, {"files": {"../a": b""}}],
        OutputError: [{"files": {"config.json": tmp_path / "missing"}}],
    }
    for error, refused in wrong.items():
        for options in refused:
            with pytest.raises(error):
                averages.export(tmp_path / "wrong", **{"which": "ema", **options})
    assert not (tmp_path / "wrong").exists() and torch.equal(model.weight.detach().double(), seen[-1])
    averages.step()


def test_config_json_of_an_average_names_the_type_of_its_weights(tmp_path: Path) -> None:
    """Weights in training may be wider than those of the checkpoint from which it started."""
    averages, _, _ = followed(2, ema=[0.9], window={"every": 1, "keep": 2})
    files = {"config.json": json.dumps({"dtype": "bfloat16"}).encode()}
    averages.export(tmp_path / "ema", "ema", files=files)
    with pytest.warns(TwaWarning, match="no step was taken"), averages.learning(files=files) as twa:
        averages._engine.module(torch.ones(1, 50)).sum().backward()
        twa.export(tmp_path / "learned")
    for name in ("ema", "learned"):
        assert json.loads((tmp_path / name / "config.json").read_text())["dtype"] == "float32"


def test_a_state_file_is_complete_or_not_there(tmp_path: Any, monkeypatch: Any) -> None:
    averages, _, _ = followed(3, ema=[0.9])
    averages.save_state(tmp_path)
    content = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert list(content) == ["averages-00000-of-00001.pt"]

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(twa_scale.OutputError, match="No space"):
        averages.save_state(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == content


@pytest.mark.parametrize(("every", "start"), [(1, 0), (3, 0), (3, 1), (3, 3), (4, 9), (20, 0), (5, 12)])
def test_a_window_counts_the_snapshots_of_a_training(every: int, start: int) -> None:
    window = WindowSettings(every=every, keep=2, start_step=start)
    for steps in range(15):
        assert window.taken_by(steps) == sum(is_due(step, every, start) for step in range(1, steps + 1))
