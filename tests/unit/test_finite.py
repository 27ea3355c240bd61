"""No writer publishes values that are not finite or overflow the type of the file."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import twa_scale
from tests import models
from tests.pool import Pool
from tests.ranks import cases
from tests.ranks.cases import Run
from twa_scale import OutputError, Snapshots, TwaError
from twa_scale.base.spans import Span
from twa_scale.output import TensorSpec, writing
from twa_scale.ranks import Group

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float8_e5m2]


def write(out: Path, values: Tensor, dtype: torch.dtype, allow_infinite: bool = False) -> Tensor:
    with writing(out, [TensorSpec("w", tuple(values.shape), dtype)], Group.alone()) as writer:
        writer.write(Span("w", 0, len(values)), values, allow_infinite=allow_infinite)
    return load_file(out / "model.safetensors")["w"]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("own", [torch.float64, torch.float32], ids=str)
def test_writer_refuses_values_that_are_not_finite(tmp_path: Path, own: torch.dtype, dtype: torch.dtype) -> None:
    values = torch.ones(2_000_000, dtype=own)
    values[0] = torch.finfo(dtype).max if dtype.itemsize < own.itemsize else 1.0
    values[1], values[2] = 1e-310, -0.0
    assert torch.equal(write(tmp_path / "out", values, dtype), values.to(dtype))
    for bad in (float("nan"), float("inf"), -float("inf")):
        values[1_999_990] = bad
        with pytest.raises(OutputError, match=rf"'w', element 1999990: holds {bad};"):
            write(tmp_path / "bad", values, dtype)
    values[1_999_990] = -1e300 if own == torch.float64 else torch.finfo(own).min
    if dtype != own:
        with pytest.raises(OutputError, match=r"'w', element 1999990: holds -.*e\+.*too large for torch.*wider dtype"):
            write(tmp_path / "bad", values, dtype, allow_infinite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(("dtype", "largest"), [(torch.float8_e4m3fn, 463.0), (torch.float8_e5m2, 61439.0)])
def test_eight_bits_do_not_saturate(tmp_path: Path, dtype: torch.dtype, largest: float) -> None:
    """The largest number is written for those that are rounded to it."""
    assert write(tmp_path / "out", torch.tensor([-largest, 1.0]), dtype).float()[0] == -torch.finfo(dtype).max
    with pytest.raises(OutputError, match=r"element 1: holds .*too large for torch\.float8"):
        write(tmp_path / "bad", torch.tensor([1.0, largest + 2]), dtype)


def test_masks_may_be_infinite_but_not_nan(tmp_path: Path) -> None:
    values = torch.tensor([0, float("-inf"), float("inf")])
    assert torch.equal(write(tmp_path / "out", values, torch.float16, allow_infinite=True), values.half())
    with pytest.raises(OutputError, match="nan"):
        write(tmp_path / "bad", values * 0, torch.float16, allow_infinite=True)


class Masked(nn.Module):
    """A model with a trained tensor, a statistic and two kinds of masks."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(5))
        self.frozen = nn.Parameter(torch.zeros(3).log(), requires_grad=False)
        self.register_buffer("mask", torch.zeros(3).log())
        self.register_buffer("running_var", torch.ones(3))


def snapshot(model: nn.Module, out: Path, **options: object) -> None:
    with Snapshots(out, every_n_steps=1, **options) as snapshots:  # type: ignore[arg-type]
        snapshots.save(model, 1)


def export(model: nn.Module, out: Path, dtype: torch.dtype | None = None) -> None:
    states = [{name: value.clone() for name, value in Masked().state_dict().items()} for _ in range(2)]
    states[1]["weight"] += 1
    for state in states:  # until masks of candidates are read
        state["frozen"], state["mask"] = torch.ones(3), torch.ones(3)
    new = model.state_dict()
    saved = {name: value.clone() for name, value in new.items()}
    twa = twa_scale.attach(model, states)
    model.load_state_dict(saved)
    twa.export(out / "step-00000001", dtype=dtype)


WRITERS: dict[str, Callable[..., None]] = {
    "snapshots": snapshot,
    "asynchronous": lambda model, out, **options: snapshot(model, out, asynchronous=True, **options),
    "export": export,
}


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize(
    ("name", "value", "dtype"),
    [
        ("weight", float("nan"), None),
        ("weight", float("inf"), None),
        ("weight", 70000.0, torch.float16),
        ("running_var", float("inf"), None),
        ("mask", float("nan"), None),
        ("frozen", float("nan"), None),
        ("mask", torch.finfo(torch.float32).min, torch.bfloat16),
    ],
)
def test_live_weights(tmp_path: Path, writer: str, name: str, value: float, dtype: torch.dtype | None) -> None:
    model = Masked()
    with torch.no_grad():
        dict(model.state_dict())[name][2] = value
    with pytest.raises(OutputError, match=rf"'{name}', element 2: holds"):
        WRITERS[writer](model, tmp_path, dtype=dtype)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("writer", WRITERS)
def test_live_masks_are_written(tmp_path: Path, writer: str) -> None:
    WRITERS[writer](Masked(), tmp_path, dtype=torch.float16)
    actual = load_file(tmp_path / "step-00000001/model.safetensors")
    assert all(torch.equal(actual[name], value.half()) for name, value in Masked().state_dict().items())


def snapshot_on_ranks(out: Path, asynchronous: bool) -> None:
    model = models.wrap(models.build(0), "fsdp2")
    with torch.no_grad():
        model.get_parameter("blocks.1.up.weight").fill_(float("nan"))
    snapshot(model, out, asynchronous=asynchronous)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_error_on_every_rank(ranks: Pool, tmp_path: Path, asynchronous: bool) -> None:
    error = ranks.error(snapshot_on_ranks, 2, out=tmp_path, asynchronous=asynchronous)
    assert isinstance(error, TwaError) and "'blocks.1.up.weight'" in str(error) and not list(tmp_path.iterdir())


# Steps


def linear(dtype: torch.dtype = torch.float32) -> tuple[nn.Module, list[dict[str, Tensor]]]:
    torch.manual_seed(0)
    model = nn.Linear(4, 3).to(dtype)
    return model, [{name: torch.randn_like(value) for name, value in model.state_dict().items()} for _ in range(3)]


def step(model: nn.Module, twa: twa_scale.TrainableAverage) -> None:
    model(torch.ones(2, 4, dtype=next(model.parameters()).dtype)).square().mean().backward()
    twa.step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("basis", ["normalized", "orthonormal", "pca"])
def test_step_to_infinite_weights_is_undone(tmp_path: Path, basis: str, dtype: torch.dtype) -> None:
    model, states = linear(dtype)
    rate = 1e6 if dtype == torch.float16 else 1e39
    twa = twa_scale.attach(model, states, {"basis": basis, "optimizer": {"name": "sgd", "lr": rate}})
    before = {name: value.clone() for name, value in model.state_dict().items()}
    coefficients = twa.coefficients
    with pytest.raises(TwaError, match=r"not finite in torch.*float.*Lower optimizer.lr"):
        step(model, twa)
    assert torch.equal(twa.coefficients, coefficients)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    twa.export(tmp_path / "out")
    twa.optimizer.param_groups[0]["lr"] = 1e-3
    step(model, twa)
    assert not torch.equal(twa.coefficients, coefficients)


def test_large_finite_weights_are_kept() -> None:
    model, states = linear()
    for state in states:
        state["weight"] *= 1e37
    twa = twa_scale.attach(model, states, {"optimizer": {"lr": 1e-3}})
    (model(torch.ones(2, 4)) * 1e-37).square().mean().backward()
    assert twa.step() and bool(model.get_parameter("weight").isfinite().all())


def test_candidates_that_overflow_the_type_of_the_model() -> None:
    model, states = linear(torch.float16)
    wide = [{name: 70000 + value.float() for name, value in state.items()} for state in states]
    for frozen in (False, True):
        model.get_parameter("bias").requires_grad_(not frozen)
        model.get_parameter("weight").data.zero_()
        stored = wide if not frozen else [{**state, "weight": state["weight"] / 1e6} for state in wide]
        with pytest.raises(TwaError, match=r"float16.*65504"):
            twa_scale.attach(model, stored)


def step_on_ranks(engine: str) -> str:
    config = {"combine": "forward" if engine == "fsdp2" else "step", "optimizer": {"name": "sgd", "lr": 1e39}}
    model, twa = cases.attach(engine, Run(config))
    messages = cases.error_text(lambda: cases.one_step(model, twa, 0))
    assert all(bool(value.isfinite().all()) for value in cases.gathered(model).values())
    return messages


@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_every_rank_undoes_the_step(ranks: Pool, engine: str) -> None:
    messages = ranks(step_on_ranks, 2, engine=engine)
    assert len(set(messages)) == 1 and "not finite" in messages[0]
