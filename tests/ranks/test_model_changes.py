"""Changes that a script makes to the model: they are used, or refused on every rank at the next step."""

import json
import warnings
from collections.abc import Callable
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import twa_scale
from tests import models, zero
from tests.grid import rest_slow
from tests.pool import Pool
from tests.ranks import cases
from tests.ranks.cases import Run
from twa_scale import TwaError
from twa_scale.base.notices import TwaWarning

RUN = Run({"groups": "block"}, steps=2)


def own_parameter(model: Any) -> Any:
    return next(p for name, p in model.named_parameters() if name.endswith("blocks.1.down.weight"))


def write(model: Any) -> None:
    with torch.no_grad():
        p = own_parameter(model)
        (p.to_local() if isinstance(p, DTensor) else p).mul_(1.0)


def write_data(model: Any) -> None:
    own_parameter(model).data.clamp_(-0.001, 0.001)


def write_all_data(model: Any) -> None:
    for parameter in model.parameters():
        parameter.data.add_(1.0)


def load(model: Any) -> None:
    model.load_state_dict(model.state_dict())


def load_by_assignment(model: Any) -> None:
    model.load_state_dict({name: value.clone() for name, value in model.state_dict().items()}, assign=True)


def convert(model: Any) -> None:
    model.to(torch.float64)


def replace(model: Any) -> None:
    inner = model.module if hasattr(model, "module") else model
    inner.blocks[1].down.weight = nn.Parameter(inner.blocks[1].down.weight.detach().clone())


def reports(act: Callable[[], None]) -> list[str]:
    """Return the notices that other code has written the weights."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        act()
    said = [str(warning.message) for warning in caught if issubclass(warning.category, TwaWarning)]
    return [text for text in said if "was written" in text]


@pytest.mark.parametrize("change", [load_by_assignment, replace])
def test_replaced_parameters_are_refused(change: Callable[[Any], None]) -> None:
    model, twa = cases.attach("plain", RUN)
    cases.one_step(model, twa, 0)
    before = twa.coefficients
    change(model)
    with pytest.raises(TwaError, match=r"parameter '.*' was replaced"):
        cases.one_step(model, twa, 1)
    assert torch.equal(twa.coefficients, before)


@pytest.mark.parametrize("change", [write, write_data, load, convert])
def test_written_weights_are_reported_once_and_overwritten(change: Callable[[Any], None]) -> None:
    model, twa = cases.attach("plain", RUN)
    cases.one_step(model, twa, 0)
    change(model)
    (said,) = reports(lambda: cases.one_step(model, twa, 1))
    assert "parameter '" in said and "before attach" in said
    change(model)
    assert not reports(lambda: cases.one_step(model, twa, 2))
    actual = cases.gathered(model)
    twa.load_state_dict(twa.state_dict())
    for name, value in cases.gathered(model).items():
        assert torch.equal(actual[name], value), name


def test_weights_of_8_bits_beside_others() -> None:
    """torch refuses operations on float8 and another type, so the comparison of elements converts them."""

    class Narrow(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3, 4).to(torch.float8_e4m3fn))
            self.bias = nn.Parameter(torch.ones(3))

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.linear(x, self.weight.float(), self.bias)

    model = Narrow()
    states = [{name: (value.float() + i).to(value.dtype) for name, value in model.state_dict().items()} for i in (1, 2)]
    twa = twa_scale.attach(model, states)

    def step() -> None:
        model(torch.ones(2, 4)).square().mean().backward()
        assert twa.step()

    assert not reports(step)
    model.weight.data.copy_(torch.zeros(3, 4))
    (said,) = reports(step)
    assert "parameter 'weight' was written" in said


def test_embedding_with_max_norm_trains() -> None:
    """`max_norm` scales rows in place in every forward pass."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(7, 4, max_norm=1.0), nn.Linear(4, 1))
    states = [
        {name: value + 0.1 * torch.randn_like(value) for name, value in model.state_dict().items()} for _ in range(3)
    ]
    twa = twa_scale.attach(model, states)

    def step() -> None:
        model(torch.arange(7)).square().mean().backward()
        assert twa.step()

    assert [len(reports(step)) for _ in range(3)] == [1, 0, 0]


def change_model(engine: str, change: Callable[[Any], None], on: str) -> tuple[str, list[str], Tensor]:
    """Change the model after a step, on the last rank or on all. Return the error, notices and coefficients."""
    model, twa = cases.attach(engine, RUN)
    cases.one_step(model, twa, 0)
    rank, size = cases.where()
    if on == "all" or rank == size - 1:
        change(model)
    said = ""

    def step() -> None:
        nonlocal said
        said = cases.error_text(lambda: cases.one_step(model, twa, 1))

    reported = reports(step)
    return said, reported, twa.coefficients


@pytest.mark.parametrize(
    ("engine", "change", "on"),
    [
        ("ddp", write, "last"),
        ("fsdp2", write, "last"),
        ("fsdp2", load, "all"),
        ("zero1", write, "all"),
        ("fsdp1", write_all_data, "last"),
    ],
)
def test_each_rank_reports_what_was_written_there(
    ranks: Pool, engine: str, change: Callable[[Any], None], on: str
) -> None:
    first, last = ranks(change_model, 2, engine=engine, change=change, on=on)
    assert not first[0] and not last[0] and torch.equal(first[2], last[2])
    assert len(last[1]) == 1 and len(first[1]) == (on == "all")


def shrink(model: Any) -> None:
    own_parameter(model).data = torch.zeros(2, 2)


def start_elsewhere(engine: str) -> list[str]:
    """Return errors of writes to a parameter that has become smaller."""
    model, twa = cases.attach(engine, RUN)
    shrink(model)
    state = twa.state_dict()
    return [cases.error_text(lambda: twa.start_from("last")), cases.error_text(lambda: twa.load_state_dict(state))]


@pytest.mark.parametrize("engine", ["ddp", "sharded-ddp"])
def test_writes_to_smaller_memory_are_refused_on_every_rank(ranks: Pool, engine: str) -> None:
    for said in chain.from_iterable(ranks(start_elsewhere, 2, engine=engine)):
        assert "blocks.1.down.weight' was replaced since attach" in said


def export_changed(engine: str, path: Path, change: Callable[[Any], None], on: list[int]) -> tuple[str, list[str]]:
    """Change the model on some ranks and export. Return the error, and the notices about what the export has."""
    model, twa = cases.attach(engine, RUN)
    if cases.where()[0] in on:
        change(model)
    said = ""

    def export() -> None:
        nonlocal said
        said = cases.error_text(lambda: twa.export(path))

    texts = [text for text in reports(export) if "The export has" in text]
    return said, texts


def double(model: Any) -> None:
    with torch.no_grad():
        own_parameter(model).mul_(2)


def overwrite(model: Any) -> None:
    """Write weights as a script with DeepSpeed does."""
    import deepspeed

    parameter = own_parameter(model.module)
    with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0), torch.no_grad():
        if not hasattr(parameter, "ds_id") or torch.distributed.get_rank() == 0:
            parameter.fill_(0.5)


def replace_one_and_write_others(model: Any) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
    replace(model)


def stride(model: Any) -> None:
    parameter = own_parameter(model)
    parameter.data = parameter.data.t().contiguous().t()


@pytest.mark.parametrize(
    ("engine", "change", "on", "has"),
    [
        ("plain", double, [0, 1], "as they are now, without coefficients"),
        ("plain", replace_one_and_write_others, [0, 1], "as they are now, without coefficients"),
        ("plain", double, [1], "that the average wrote"),  # a replica whose weights are not exported
        ("ddp", double, [0, 1], "as they are now, without coefficients"),
        *((engine, overwrite, [0, 1], "that the average wrote") for engine in zero.ENGINES),
    ],
)
def test_exports_say_whether_they_have_a_change(
    ranks: Pool, tmp_path: Path, engine: str, change: Callable[[Any], None], on: list[int], has: str
) -> None:
    results = ranks(export_changed, 2, engine=engine, path=tmp_path / "out", change=change, on=on)
    assert not any(said for said, _ in results)
    texts = list(chain.from_iterable(reported for _, reported in results))
    assert texts and all(f"The export has the weights {has}." in text for text in texts)
    origin = json.loads((tmp_path / "out/twa_scale.json").read_text())
    assert ("coefficients" in origin) == (has == "that the average wrote")


def test_an_export_that_one_rank_cannot_compare_is_refused_on_every_rank(ranks: Pool, tmp_path: Path) -> None:
    results = ranks(export_changed, 2, engine="plain", path=tmp_path / "out", change=stride, on=[1])
    assert all("is not contiguous in memory" in said for said, _ in results), results


@pytest.mark.parametrize("engine", ["ddp", "sharded-ddp"])
def test_replaced_parameter_is_named_on_every_rank(ranks: Pool, engine: str) -> None:
    (said, *_), (other, *_) = ranks(change_model, 2, engine=engine, change=replace, on="all")
    assert said == other and "parameter '" in said and "attach" in said


@pytest.mark.parametrize(
    "engine",
    rest_slow(
        [(engine,) for engine in ("plain", "ddp", "fsdp2", "fsdp1", "sharded-ddp", *zero.ENGINES)],
        lambda engine: engine in ("plain", "fsdp2", "zero1"),
    ),
)
def test_reads_between_steps_are_not_reported(ranks: Pool, engine: str) -> None:
    for reported, weights in ranks(between_steps, 2, engine=engine):
        assert not reported
        assert all(bool(value.isfinite().all()) for value in weights.values())


def between_steps(engine: str) -> tuple[list[str], dict[str, Tensor]]:
    """Evaluate, gather, save and swap in other weights. None of these changes the live weights permanently."""
    model, twa = cases.attach(engine, RUN)
    reported = []
    for step in range(3):
        reported += reports(partial(cases.one_step, model, twa, step))
        with torch.no_grad():
            model.eval()
            models.loss(model, models.batch(50))
            model.train()
        cases.gathered(model)
        model.state_dict()
        with twa.weights("last"), torch.no_grad():
            models.loss(model, models.batch(51))
        twa.load_state_dict(twa.state_dict())
    return reported, cases.gathered(model)


def test_gradient_written_by_a_script_is_used() -> None:
    def trained(by_hand: bool) -> dict[str, Tensor]:
        model, twa = cases.attach("plain", Run({"groups": "block", "optimizer": {"name": "sgd", "lr": 0.01}}))
        named = dict(model.named_parameters())
        loss = models.loss(model, models.batch(0))
        if by_hand:
            tensors = [p for p in named.values() if p.requires_grad]
            for p, gradient in zip(tensors, torch.autograd.grad(loss, tensors), strict=True):
                p.grad = gradient
        else:
            loss.backward()
        assert twa.step()
        return cases.gathered(model)

    expected = trained(by_hand=False)
    for name, value in trained(by_hand=True).items():
        torch.testing.assert_close(value, expected[name])


def test_the_error_of_torch_about_a_hook_of_the_script_is_raised() -> None:
    """torch passes the value of a hook to the next one, in place of the parameter, and then refuses it."""
    model = models.build()
    model.stem.conv.weight.register_post_accumulate_grad_hook(lambda p: p.grad)
    twa_scale.attach(model, models.candidates())
    with pytest.raises(RuntimeError, match="should return None"):
        models.loss(model, models.batch(0)).backward()


def notices_of(wrapped: bool) -> list[str]:
    model = models.build()
    outer = DistributedDataParallel(model) if wrapped else nn.Sequential(model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        twa_scale.attach(model, models.candidates())
    assert outer is not None
    said = [str(warning.message) for warning in caught if issubclass(warning.category, TwaWarning)]
    return [text for text in said if "plain module" in text]


def test_attach_to_a_wrapped_module_is_reported_once(ranks: Pool) -> None:
    said, other = ranks(notices_of, 2, wrapped=True)
    assert len(said) == 1 and "Attach to the DistributedDataParallel" in said[0] and not other
    assert ranks(notices_of, 2, wrapped=False) == [[], []]
