"""The average of each kind of tensor: `attach` at the center and `average` give the same bits."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import twa_scale
from tests.sums import weighted
from twa_scale import ConfigError, TwaWarning
from twa_scale.average.state import save_state
from twa_scale.candidates.buffers import is_statistic, own_buffers
from twa_scale.merge import average_fixed, export_run

N = 3


class Everything(nn.Module):
    """Weights of several types and sizes, statistics, spectral norms of both kinds, and other buffers."""

    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(7, 33)
        self.norm = nn.BatchNorm1d(33)
        self.old = nn.utils.spectral_norm(nn.Linear(33, 6))
        self.new = nn.utils.parametrizations.spectral_norm(nn.Linear(6, 5))
        self.narrow = nn.Parameter(torch.randn(1001).half())
        self.brain = nn.Parameter(torch.randn(70, 3).bfloat16())
        self.scalar = nn.Parameter(torch.randn(()))
        self.empty = nn.Parameter(torch.empty(0, 4))
        self.frozen = nn.Parameter(torch.randn(9, dtype=torch.float64), requires_grad=False)
        self.register_buffer("scale", torch.rand(4))
        self.register_buffer("wide_running_mean", torch.randn(4, dtype=torch.float64))
        self.register_buffer("flags", torch.rand(5) > 0.5)
        self.register_buffer("table", torch.randint(9, (5,), dtype=torch.int16))


def states(n: int = N) -> list[dict[str, Tensor]]:
    """Return candidates that differ in every tensor. Some numbers are subnormal, and some are equal."""
    actual = []
    for seed in range(n):
        torch.manual_seed(seed)
        state = {name: value.clone() for name, value in Everything().state_dict().items()}
        for name in ("norm.running_mean", "norm.running_var"):
            state[name] = torch.rand(33) + 0.5
        state["norm.num_batches_tracked"] += seed
        state["first.weight"][0] = 1e-41 * (seed + 1)
        state["first.weight"][1] = 1 / 3
        actual.append(state)
    return actual


def save(folder: Path, candidates: Sequence[Mapping[str, Tensor]]) -> list[str]:
    paths = [str(folder / f"{i}.safetensors") for i in range(len(candidates))]
    for path, state in zip(paths, candidates, strict=True):
        save_file(dict(state), path)
    return paths


def ours(caught: Any) -> list[str]:
    return [str(warning.message) for warning in caught if issubclass(warning.category, TwaWarning)]


COUNTER = "norm.num_batches_tracked"
COPIED = {
    *("old.weight_u", "old.weight_v", "new.parametrizations.weight.0._u", "new.parametrizations.weight.0._v"),
    *(COUNTER, "flags", "table"),
}
"""By names alone; a model also knows that `scale` is a buffer, and `wide_running_mean` no statistic's name."""


@pytest.mark.parametrize("weights", ["mean", "ema:0.9", "ema-torch:0.7", [1.7, -0.4, -0.3], "last"], ids=str)
def test_attach_and_average_give_the_same_bits(tmp_path: Path, weights: Any) -> None:
    candidates = states()
    for state in candidates[1:]:  # files do not show that these are buffers
        state["scale"], state["wide_running_mean"] = candidates[0]["scale"], candidates[0]["wide_running_mean"]
    paths, model = save(tmp_path, candidates), Everything()
    with pytest.warns(TwaWarning) as attached:
        twa = twa_scale.attach(model, paths, {"center": weights})
    twa.export(tmp_path / "live")
    with pytest.warns(TwaWarning) as averaged:
        average_fixed(paths, tmp_path / "merged", weights)
    live, merged = (load_file(tmp_path / out / "model.safetensors") for out in ("live", "merged"))
    assert live.keys() == merged.keys() == candidates[0].keys()
    for name, value in merged.items():
        assert value.dtype == candidates[0][name].dtype and torch.equal(live[name], value), name
        if name in COPIED:
            assert torch.equal(value, candidates[-1][name]), name
    messages = ours(attached)
    assert messages == ours(averaged) and len(messages) == 1
    assert (
        f"from {paths[-1]}" in messages[0] and "and 2 more" in messages[0] and "num_batches_tracked" not in messages[0]
    )


def test_counters_of_batchnorm_are_copied_without_a_notice(tmp_path: Path) -> None:
    candidates = states()
    for state in candidates[1:]:
        state.update({name: candidates[0][name] for name in {*COPIED, "scale", "wide_running_mean"} - {COUNTER}})
    paths, model = save(tmp_path, candidates), Everything()
    with warnings.catch_warnings():
        warnings.simplefilter("error", TwaWarning)
        twa_scale.attach(model, paths).close()
        average_fixed(paths, tmp_path / "merged", "mean")
    assert torch.equal(model.state_dict()[COUNTER], candidates[-1][COUNTER])
    assert torch.equal(load_file(tmp_path / "merged/model.safetensors")[COUNTER], candidates[-1][COUNTER])


def test_statistics_are_averaged_and_other_buffers_are_those_of_one_candidate(tmp_path: Path) -> None:
    candidates = states()
    paths = save(tmp_path, candidates)
    b = [0.2, 0.3, 0.5]
    rules: dict[Any, tuple[list[float], int]] = {
        "average": (b, 2),
        "mean": ([1 / 3] * 3, 2),
        "first": ([1, 0, 0], 0),
        1: ([0, 1, 0], 1),
    }
    for i, (option, (expected, which)) in enumerate(rules.items()):
        model = Everything()
        with pytest.warns(TwaWarning, match="copied, not averaged"):
            twa_scale.attach(model, paths, {"center": b, "buffers": option}).close()
        with pytest.warns(TwaWarning, match="copied, not averaged"):
            average_fixed(paths, tmp_path / f"{i}", b, buffers=str(option))
        for actual in (model.state_dict(), load_file(tmp_path / f"{i}/model.safetensors")):
            for name in ("norm.running_mean", "norm.running_var"):
                exact = weighted(expected, (state[name].double() for state in candidates))
                torch.testing.assert_close(actual[name].double(), exact, rtol=1e-6, atol=1e-7)
            for name in ("old.weight_u", "new.parametrizations.weight.0._v"):
                assert torch.equal(actual[name], candidates[which][name])
            assert torch.equal(actual["table"], candidates[-1]["table"])
        assert torch.equal(model.scale, candidates[which]["scale"])


@pytest.mark.parametrize("option", ["median", "7", "-4", ""])
def test_invalid_buffers_option_raises(tmp_path: Path, option: str) -> None:
    with pytest.raises(ConfigError, match="buffers"):
        average_fixed(save(tmp_path, states()), tmp_path / "out", buffers=option)


def test_an_exported_run_has_the_buffers_of_the_live_weights(tmp_path: Path) -> None:
    candidates = states()
    paths, model = save(tmp_path, candidates), Everything()
    with pytest.warns(TwaWarning):
        twa = twa_scale.attach(model, paths, {"center": "ema:0.8", "buffers": "average"})
    state = {
        "twa": twa.state_dict(),
        "step": 0,
        "keep": "last",
        "kept": None,
        "finished": False,
        "course": {},
        "candidates": paths,
    }
    save_state(tmp_path / "run", state)
    with pytest.warns(TwaWarning, match="copied"):
        export_run(tmp_path / "run", tmp_path / "out")
    merged = load_file(tmp_path / "out/model.safetensors")
    assert all(torch.equal(value, merged[name]) for name, value in model.state_dict().items())


def test_spectral_norms_have_norm_one_when_they_are_averaged(tmp_path: Path) -> None:
    candidates = states()
    model = Everything()
    model.load_state_dict(candidates[-1])
    with pytest.warns(TwaWarning):
        average_fixed(save(tmp_path, candidates), tmp_path / "out")
    averaged = load_file(tmp_path / "out/model.safetensors")
    for name in ("old.weight_u", "old.weight_v", "new.parametrizations.weight.0._u"):
        assert averaged[name].norm().item() == pytest.approx(1, abs=1e-6)


def test_names_of_buffers() -> None:
    statistics = ["running_mean", "a.running_var", "x.moving_variance", "running_std"]
    others = ["running", "a.prerunning_mean", "running_mean.weight", "mean", "num_batches_tracked"]
    assert all(map(is_statistic, statistics)) and not any(map(is_statistic, others))
    vectors = ["a.weight_u", "a.weight_v", "w_u", "b.parametrizations.bias.1._u"]
    vectors += ["a.weight_mask", "q.min_val", "q.max_val", "q.scale"]
    beside = ["a.weight_orig", "w_bar", "b.parametrizations.bias.original", "q.fake_quant_enabled"]
    beside += ["learned.scale", "learned.fake_quant_enabled", "learned.learning_enabled"]
    others = [
        "weight_u",
        "weight_mask",
        "min_val",
        "norm.scale",
        "lora_v",
        "c.weight_u",
        "c.weight",
        "d.parametrizations.bias.0._u",
        "b.parametrizations.bias.1.u",
    ]
    assert own_buffers([*vectors, *beside, *others]) == set(vectors)


def test_equal_copies_are_not_reported(tmp_path: Path, recwarn: Any) -> None:
    candidates = states()
    for state in candidates:
        state.update({name: candidates[0][name] for name in COPIED})
    average_fixed(save(tmp_path, candidates), tmp_path / "out")
    assert not ours(recwarn)


# Types


@pytest.mark.parametrize(
    ("types", "result"),
    [
        ((torch.float32, torch.bfloat16), torch.float32),
        ((torch.bfloat16, torch.float32), torch.float32),
        ((torch.float16, torch.bfloat16), torch.float32),
        ((torch.float16, torch.float64), torch.float64),
        ((torch.float8_e4m3fn, torch.bfloat16), torch.bfloat16),
        ((torch.float8_e4m3fn, torch.float8_e5m2), torch.bfloat16),
    ],
    ids=str,
)
def test_result_has_the_widest_dtype_and_is_reported(tmp_path: Path, types: Any, result: torch.dtype) -> None:
    stored = [{"weight": torch.randn(3, 2).to(dtype), "bias": torch.randn(3)} for dtype in types]
    paths = save(tmp_path, stored)
    exact = sum(state["weight"].double() for state in stored) / 2
    model = nn.Linear(2, 3)
    twa = twa_scale.attach(model, paths)
    writers: dict[str, Callable[..., object]] = {"live": twa.export, "merged": partial(average_fixed, paths)}
    for out, write in writers.items():
        with pytest.warns(TwaWarning, match=f"'weight' as .* widest type, {str(result)[6:]};") as caught:
            write(tmp_path / out)
        assert len(ours(caught)) == 1
        actual = load_file(tmp_path / out / "model.safetensors")
        assert actual["weight"].dtype == result and actual["bias"].dtype == torch.float32
        torch.testing.assert_close(actual["weight"].double(), exact, rtol=1e-2, atol=1e-2)


def test_requested_type_is_not_reported(tmp_path: Path, recwarn: Any) -> None:
    paths = save(tmp_path, [{"w": torch.ones(3)}, {"w": torch.zeros(3).bfloat16()}])
    average_fixed(paths, tmp_path / "out", dtype="float16")
    assert load_file(tmp_path / "out/model.safetensors")["w"].dtype == torch.float16 and not ours(recwarn)
