"""Coefficients per row: the elements of a row, the training of corrections, and their state."""

from typing import Any

import pytest
import torch
from torch import nn

import twa_scale
from tests import models, reference
from tests.ranks import cases
from tests.ranks.cases import Run
from twa_scale import ConfigError, StateError, TwaError
from twa_scale.average.rows.shapes import row_lengths, rows_of
from twa_scale.base.spans import Span, block, whole_tensor

ROWS: dict[str, Any] = {"groups": "tensor+row", "optimizer": {"name": "sgd", "lr": 0.005, "row_lr": 0.02}}


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stacked = nn.Parameter(torch.zeros(3, 4, 5))
        self.one = nn.Parameter(torch.zeros(1, 1, 5))
        self.bias = nn.Parameter(torch.zeros(5))


@pytest.mark.parametrize(
    ("module", "lengths"),
    [
        (nn.Linear(6, 4), {"weight": 6}),
        (nn.Linear(6, 1), {}),
        (nn.Embedding(7, 3), {"weight": 3}),
        (nn.Conv2d(3, 4, 5), {"weight": 75}),
        (nn.utils.parametrizations.weight_norm(nn.Conv1d(2, 4, 3)), {"parametrizations.weight.original1": 6}),
        (Experts(), {"stacked": 5}),
    ],
)
def test_rows_of_modules(module: nn.Module, lengths: dict[str, int]) -> None:
    shapes = {name: tuple(p.shape) for name, p in module.named_parameters()}
    actual = {name: length for name, length in row_lengths(module, shapes).items() if not name.endswith("original0")}
    assert actual == lengths


SPANS = [
    (whole_tensor("w", (4, 6)), 6),
    (Span("w", 3, 17), 6),
    (Span("w", 7, 9), 6),
    (Span("w", 6, 12), 6),
    (block("w", (4, 6), (0, 2), (4, 3)), 6),  # columns of a matrix
    (block("w", (3, 4, 5), (0, 1, 0), (3, 2, 5)), 5),  # outputs of stacked experts
    (block("w", (3, 4, 5), (0, 0, 2), (3, 4, 2)), 5),  # inputs of stacked experts
    (block("w", (4, 3, 2, 2), (0, 1, 0, 0), (4, 1, 2, 2)), 12),  # an input channel of a convolution
    (block("w", (4, 3, 2, 2), (0, 0, 1, 0), (4, 3, 1, 2)), 12),  # a part of the kernel of a convolution
]


@pytest.mark.parametrize(("span", "length"), SPANS)
def test_every_element_of_a_span_is_in_its_row(span: Span, length: int) -> None:
    rows, segments, partial = rows_of(span, length)
    actual = [int(rows[(segments.lead + i) // segments.length]) for i in range(len(span))]
    assert actual == [span.element(i) // length for i in range(len(span))]
    assert segments.count == len(rows) == len(partial)
    assert partial.tolist() == [actual.count(int(row)) < length for row in rows]


def take_steps(model: nn.Module, twa: twa_scale.TrainableAverage, first: int, last: int) -> None:
    for step in range(first, last):
        cases.one_step(model, twa, step)


def test_corrections_are_those_of_averaging_coefficients() -> None:
    model, twa = cases.attach("plain", Run({**ROWS, "center": "ema:0.6"}))
    take_steps(model, twa, 0, 2)
    weights, states = cases.gathered(model), torch.utils.data.default_collate(models.candidates())
    corrections = twa.row_corrections()
    assert set(corrections) == {
        name for name, value in weights.items() if name in twa.layout.group_of and value.dim() > 1
    }
    for name, of_rows in corrections.items():
        a = twa.coefficients[:, twa.layout.group_of[name], None] + of_rows
        torch.testing.assert_close(a.sum(0), torch.ones(a.shape[1], dtype=torch.float64))
        w = torch.einsum("nr,nre->re", a, states[name].double().flatten(2))
        torch.testing.assert_close(weights[name].double().flatten(1), w, rtol=1e-5, atol=1e-6)


def test_weight_gradients_are_clipped() -> None:
    config = {**ROWS, "max_weight_grad_norm": 0.5, "max_grad_norm": 0.2}
    model, twa = cases.attach("plain", Run(config))
    take_steps(model, twa, 0, 4)
    steps = [cases.micro_batches(step, 1, 1) for step in range(4)]
    expected = reference.train(models.build(), models.loss, models.candidates(), config, steps)
    assert min(expected.norms) > 0.5, "nothing was clipped"
    for name, value in cases.gathered(model).items():
        assert (value.double() - expected.weights[-1][name]).norm() <= 1e-5 * expected.weights[-1][name].norm(), name


def test_a_scaled_loss_changes_nothing() -> None:
    """Multiplication by powers of two is exact."""
    ends = []
    for scale in (1.0, 1024.0):
        model, twa = cases.attach("plain", Run({**ROWS, "max_grad_norm": 0.2}))
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        for step in range(3):
            scaler.scale(models.loss(model, models.batch(step))).backward()
            assert twa.step(scaler)
            scaler.update()
            twa.zero_grad()
        ends.append(twa.state_dict()["rows"]["values"])
    assert all(torch.equal(ends[1][name], value) for name, value in ends[0].items())


def test_an_overflowed_gradient_changes_nothing() -> None:
    model, twa = cases.attach("plain", Run(ROWS))
    take_steps(model, twa, 0, 1)
    before = twa.state_dict()["rows"]["values"]
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    (scaler.scale(models.loss(model, models.batch(1))) * torch.inf).backward()
    assert not twa.step(scaler)
    assert all(torch.equal(value, before[name]) for name, value in twa.state_dict()["rows"]["values"].items())


def test_schedulers_change_both_rates() -> None:
    _, twa = cases.attach("plain", Run(ROWS))
    torch.optim.lr_scheduler.LambdaLR(twa.optimizer, lambda _: 0.5)
    assert [group["lr"] for group in twa.optimizer.param_groups] == [0.0025, 0.01]


def test_row_lr_is_a_tenth_of_lr() -> None:
    _, twa = cases.attach("plain", Run({"groups": "block+row", "optimizer": {"lr": 0.5}}))
    assert [group["lr"] for group in twa.optimizer.param_groups] == [0.5, 0.05]


def test_a_search_does_not_drop_corrections() -> None:
    model, twa = cases.attach("plain", Run(ROWS))
    take_steps(model, twa, 0, 1)
    with pytest.raises(ConfigError, match="which a search would drop"):
        twa_scale.search(twa, lambda: 0.0, method="sweep", higher_is_better=False, budget=2)


def test_a_tensor_that_overflows_float16_is_refused() -> None:
    """Bounds by norms allow an overflow, so that weights are read. For small steps the bounds suffice afterwards."""
    states = [{"weight": torch.full((4, 3), 3e4 + 1e3 * i)} for i in range(3)]
    model = nn.Linear(3, 4, bias=False).half()
    twa = twa_scale.attach(
        model, states, {"groups": "tensor+row", "optimizer": {"name": "sgd", "lr": 1e-9, "row_lr": 1.0}}
    )
    inputs = torch.tensor([[1.0, 0.0, 0.0]], dtype=torch.float16)
    for loss_scale, fits in ((1e-6, True), (-100.0, False)):
        (model(inputs)[0, 2].float() * loss_scale).backward()
        if fits:
            assert twa.step()
        else:
            with pytest.raises(TwaError, match=r"'weight'.*not finite in torch.float16"):
                twa.step()
        twa.zero_grad()
    assert bool(torch.isfinite(model.weight).all())


def test_another_start_has_no_corrections() -> None:
    model, twa = cases.attach("plain", Run(ROWS))
    take_steps(model, twa, 0, 2)
    assert any(bool(value.any()) for value in twa.state_dict()["rows"]["values"].values())
    trained = cases.gathered(model)
    with twa.weights("last"):
        last = cases.gathered(model)
    assert all(torch.equal(value, trained[name]) for name, value in cases.gathered(model).items())
    twa.start_from("last")
    assert not any(bool(value.any()) for value in twa.state_dict()["rows"]["values"].values())
    torch.testing.assert_close(cases.gathered(model)["blocks.0.qkv.weight"], last["blocks.0.qkv.weight"])


def test_weights_that_overflow_are_refused() -> None:
    """The corrections alone exceed float32. Coefficients and corrections do not change."""
    model, twa = cases.attach("plain", Run({**ROWS, "optimizer": {"name": "rmsprop", "lr": 1e-30, "row_lr": 3e37}}))
    before = cases.gathered(model)
    models.loss(model, models.batch(0)).backward()
    with pytest.raises(TwaError, match="not finite"):
        twa.step()
    assert all(torch.equal(value, before[name]) for name, value in cases.gathered(model).items())
    assert not any(bool(value.any()) for value in twa.state_dict()["rows"]["values"].values())


TEXTS = {
    "missing": "rows: is missing",
    "other rows": "rows.values: 'embed.weight' has shape",
    "not finite": "rows.values.embed.weight: .*not finite",
    "moments of another optimizer": "optimizer.state.momentum_buffer",
    "moments that are no tensors": "rows.moments",
    "other directions": "its directions differ",
}


@pytest.mark.parametrize("damage", TEXTS)
def test_states_that_do_not_fit_are_refused(damage: str) -> None:
    config = {**ROWS, "optimizer": {"name": "sgd", "lr": 0.005, "momentum": 0.9}}
    model, twa = cases.attach("plain", Run(config))
    take_steps(model, twa, 0, 1)
    state = twa.state_dict()
    values = state["rows"]["values"]
    match damage:
        case "missing":
            state["rows"] = None
        case "other rows":
            values["embed.weight"] = values["embed.weight"][:, :-1].contiguous()
        case "not finite":
            values["embed.weight"][0, 0] = torch.nan
        case "moments that are no tensors":
            state["rows"]["moments"]["momentum_buffer"] = {"embed.weight": "none"}
        case "other directions":
            state["rows"]["maps"] = -state["rows"]["maps"]
        case _:
            state["rows"]["moments"] = {"exp_avg": state["rows"]["moments"]["momentum_buffer"]}
    with pytest.raises(StateError, match=TEXTS[damage]):
        twa.load_state_dict(state)


@pytest.mark.parametrize(
    ("config", "text"),
    [
        ({"groups": "tensor+row", "basis": "orthonormal"}, "is for the bases normalized and pca"),
        ({"groups": "tensor+row", "optimizer": {"name": "muon"}}, "computes with whole matrices"),
        ({"groups": "tensor", "optimizer": {"row_lr": 0.1}}, "optimizer.row_lr is for groups"),
        ({"groups": "tensor", "row_exchange": "int8"}, "row_exchange is for groups"),
        ({"groups": "tensor+row", "include": ["norm"]}, "no trained tensor has more than one row"),
    ],
)
def test_settings_that_do_not_fit_are_refused(config: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        cases.attach("plain", Run(config))
