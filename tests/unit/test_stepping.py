"""The optimizer of the public API, and the closing of an average, in one process."""

import copy
import io
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch

import twa_scale
from tests import models
from tests.pool import Pool
from tests.ranks import cases
from tests.ranks.cases import Run
from twa_scale import ConfigError, EngineError, OutputError, Snapshots, StateError, TrainableAverage, TwaError

RUN = Run({"groups": "block", "optimizer": {"name": "adamw", "lr": 0.03}}, steps=4)


def attach(**config: Any) -> tuple[Any, TrainableAverage]:
    return cases.attach("plain", Run({**RUN.config, **config}))


def loss(model: Any, step: int) -> torch.Tensor:
    """Return the loss with BatchNorm in evaluation mode, so that only the weights change it."""
    model.stem.norm.eval()
    return models.loss(model, models.batch(step))


def trained(take: Callable[[Any, TrainableAverage, int], object], **config: Any) -> dict[str, torch.Tensor]:
    model, twa = attach(**config)
    for step in range(RUN.steps):
        take(model, twa, step)
    return cases.gathered(model)


def by_twa(model: Any, twa: TrainableAverage, step: int) -> None:
    loss(model, step).backward()
    assert twa.step()
    twa.zero_grad()


def by_optimizer(model: Any, twa: TrainableAverage, step: int) -> None:
    twa.optimizer.zero_grad()
    loss(model, step).backward()
    twa.optimizer.step()


def by_closure(model: Any, twa: TrainableAverage, step: int) -> None:
    def closure() -> torch.Tensor:
        twa.optimizer.zero_grad()
        value = loss(model, step)
        value.backward()
        return value

    with torch.no_grad():  # as torch's optimizers, which enable gradients for a closure
        assert twa.optimizer.step(closure).item() > 0


def same(weights: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(weights[name], value) for name, value in want.items())


@pytest.mark.parametrize("take", [by_optimizer, by_closure])
@pytest.mark.parametrize("name", ["adamw", "sgd", "rmsprop"])
def test_a_step_of_the_optimizer_is_the_step_of_the_average(take: Any, name: str) -> None:
    optimizer = {"name": name, "lr": 0.01}
    expected = trained(by_twa, optimizer=optimizer)
    assert same(trained(take, optimizer=optimizer), expected)
    assert not same(expected, cases.gathered(attach(optimizer=optimizer)[0]))


@pytest.mark.parametrize("take", [by_twa, by_optimizer])
def test_schedulers_and_hooks_see_every_step_once(take: Any) -> None:
    _, twa = attach()
    model, twa = attach()
    seen: list[str] = []
    twa.optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    twa.optimizer.register_step_post_hook(lambda *_: seen.append("after"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a scheduler warns about steps that it has not seen
        scheduler = torch.optim.lr_scheduler.StepLR(twa.optimizer, step_size=1, gamma=0.0)
        before = twa.coefficients
        take(model, twa, 0)
        scheduler.step()
        moved = twa.coefficients
        take(model, twa, 1)
    assert seen == ["before", "after"] * 2
    assert not torch.equal(before, moved) and torch.equal(moved, twa.coefficients), "a rate of 0 moves nothing"


@pytest.mark.parametrize("unscale", [False, True])
@pytest.mark.parametrize("config", [{}, {"max_grad_norm": 0.01}], ids=["free", "clipped"])
@pytest.mark.filterwarnings("ignore:GradScaler is going to stop passing itself:FutureWarning")
def test_a_scaler_steps_the_optimizer(unscale: bool, config: dict[str, Any]) -> None:
    """The second step overflows. It is skipped, and the scale is lowered."""

    def steps(scaling: bool) -> tuple[dict[str, torch.Tensor], list[float]]:
        model, twa = attach(**config)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        scales = []
        for step in range(4):
            value = loss(model, step)
            if not scaling:
                if step != 1:
                    value.backward()
                    twa.optimizer.step()
            else:
                scaler.scale(value * (float("inf") if step == 1 else 1.0)).backward()
                if unscale:
                    scaler.unscale_(twa.optimizer)
                scaler.step(twa.optimizer)
                scaler.update()
                scales.append(scaler.get_scale())
            twa.optimizer.zero_grad()
        return cases.gathered(model), scales

    expected, _ = steps(scaling=False)
    weights, scales = steps(scaling=True)
    assert scales == [1024, 512, 512, 512]
    for name, value in expected.items():
        torch.testing.assert_close(weights[name], value, rtol=1e-5, atol=1e-6)


def test_scaler_that_is_not_passed_raises() -> None:
    model, twa = attach()
    own = twa.optimizer.step
    twa.optimizer.step = lambda *args, **kwargs: own(*args, **kwargs)  # type: ignore[method-assign]
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(loss(model, 0)).backward()
    with pytest.raises(TwaError, match=r"twa\.step\(scaler\)"):
        scaler.step(twa.optimizer)


def test_the_state_of_the_optimizer_continues_the_run() -> None:
    expected = trained(by_optimizer)
    model, twa = attach()
    for step in range(2):
        by_optimizer(model, twa, step)
    file = io.BytesIO()
    torch.save(twa.optimizer.state_dict(), file)
    model, twa = attach()
    twa.optimizer.load_state_dict(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
    scheduler = torch.optim.lr_scheduler.LambdaLR(twa.optimizer, lambda _: 1.0)
    for step in range(2, RUN.steps):
        by_optimizer(model, twa, step)
        scheduler.step()
    assert same(cases.gathered(model), expected)


def test_the_state_of_another_optimizer_is_refused() -> None:
    _, twa = attach()
    other = torch.optim.AdamW([torch.zeros(1, requires_grad=True)])
    for state in (other.state_dict(), None, [1]):
        with pytest.raises(StateError, match=r"twa\.optimizer"):
            twa.optimizer.load_state_dict(state)  # type: ignore[arg-type]
    with pytest.raises(TwaError, match="add_param_group"):
        twa.optimizer.add_param_group({"params": [torch.zeros(1, requires_grad=True)]})


def load_on_the_first_rank() -> None:
    _, twa = attach()
    state = twa.optimizer.state_dict() if cases.where()[0] == 0 else None
    twa.optimizer.load_state_dict(state)  # type: ignore[arg-type]


def test_a_state_that_one_rank_lacks_is_refused_on_all(ranks: Pool) -> None:
    assert "twa.optimizer" in str(ranks.error(load_on_the_first_rank, 2))


@pytest.mark.parametrize("second", ["twa", "optimizer"])
@pytest.mark.parametrize("first", ["twa", "optimizer"])
def test_a_second_step_on_one_gradient_is_refused(first: str, second: str) -> None:
    model, twa = attach()
    step: dict[str, Callable[[], object]] = {"twa": twa.step, "optimizer": twa.optimizer.step}
    by_twa(model, twa, 0)
    loss(model, 1).backward()
    step[first]()
    before = twa.coefficients
    with pytest.raises(TwaError, match="the same step"):
        step[second]()
    assert torch.equal(before, twa.coefficients)
    by_twa(model, twa, 2)


def test_a_gradient_of_zero_is_a_gradient() -> None:
    model, twa = attach()
    by_twa(model, twa, 0)
    before = twa.coefficients
    (loss(model, 1) * 0).backward()
    assert twa.step()
    assert not torch.equal(before, twa.coefficients), "momentum moves on"


USES: dict[str, Callable[[TrainableAverage], object]] = {
    "step": lambda twa: twa.step(),
    "optimizer.step": lambda twa: twa.optimizer.step(),
    "optimizer.zero_grad": lambda twa: twa.optimizer.zero_grad(),
    "optimizer.state_dict": lambda twa: twa.optimizer.state_dict(),
    "zero_grad": lambda twa: twa.zero_grad(),
    "write_deferred": lambda twa: twa.write_deferred(),
    "weights": lambda twa: twa.weights("mean"),
    "recalibrate_batchnorm": lambda twa: twa.recalibrate_batchnorm([]),
    "export": lambda twa: twa.export("never-written"),
    "state_dict": lambda twa: twa.state_dict(),
    "load_state_dict": lambda twa: twa.load_state_dict({}),
    "cost": lambda twa: twa.cost(1),
    "as_optimizer": lambda twa: twa.as_optimizer(),
    "can_start_from": lambda twa: twa.can_start_from("last"),
    "row_corrections": lambda twa: twa.row_corrections(),
    "start_from": lambda twa: twa.start_from("last"),
    "set_lr": lambda twa: twa.set_lr(0.1),
    "save_in_memory": lambda twa: twa.save_in_memory(),
    "together": lambda twa: twa.together(None),
    "distance": lambda twa: twa.distance(),
}


def test_closed_average_raises() -> None:
    _, twa = attach()
    a = twa.coefficients
    twa.close()
    twa.close()
    methods = {name for name, value in vars(TrainableAverage).items() if callable(value) and not name.startswith("_")}
    assert methods - {"close", "described", "origin"} <= USES.keys()  # these describe the coefficients, which remain
    for name, use in USES.items():
        with pytest.raises(TwaError, match=rf"^{name.removeprefix('optimizer.')}: .* is closed"):
            use(twa)
    assert torch.equal(twa.coefficients, a) and twa.num_candidates == models.NUM_CANDIDATES
    assert twa.bytes_read >= 0 and twa.store_bytes >= 0


@pytest.mark.parametrize(
    "copied", [copy.copy, copy.deepcopy, pickle.dumps, lambda thing: torch.save(thing, io.BytesIO())]
)
def test_copies_raise_with_an_alternative(copied: Callable[[Any], object]) -> None:
    _, twa = attach()
    for thing in (twa, twa.optimizer):
        with pytest.raises(TwaError, match=r"state_dict\(\)"):
            copied(thing)


@pytest.mark.parametrize(
    "which", [torch.ones(4, device="meta"), torch.ones(4, dtype=torch.complex64), torch.ones(4, dtype=torch.bool)[:2]]
)
def test_invalid_coefficients_raise(which: torch.Tensor) -> None:
    _, twa = attach()
    with pytest.raises(ConfigError, match="weights"), twa.weights(which):
        pass
    with twa.weights(torch.ones(4, requires_grad=True) / 4):
        pass


@pytest.mark.parametrize("out", [None, 5, "", "a\0b", b"out"])
def test_outputs_that_are_not_paths_raise(out: Any) -> None:
    _, twa = attach()
    for use in (lambda: twa.export(out), lambda: Snapshots(out, every_n_steps=1)):
        with pytest.raises(OutputError, match="is not a path"):
            use()


def test_none_as_replica_group() -> None:
    with pytest.raises(EngineError, match="replica_group: is a int"):
        twa_scale.attach(models.build(), models.candidates(), replica_group=5)  # type: ignore[arg-type]


def test_repr_of_an_average() -> None:
    _, twa = attach(store="packed4")
    expected = f"TrainableAverage(candidates={twa.num_candidates}, groups={len(twa.layout.groups)} ('block'), "
    expected += "basis='normalized', store='packed4', engine=PlainEngine"
    assert repr(twa) == expected + ")"
    twa.close()
    assert repr(twa) == expected + ", closed)"


def test_unpacking_raises_with_a_fix() -> None:
    _, twa = attach()
    for inputs in (twa, twa.as_optimizer()):
        with pytest.raises(TwaError, match=r"optimizers=\(twa\.as_optimizer\(\), None\)"):
            _optimizer, _scheduler = inputs


def test_a_compiled_function_takes_the_same_steps() -> None:
    """Hooks and steps run in the compiled function, but are not compiled."""

    def take(model: Any, twa: TrainableAverage) -> None:
        model(torch.ones(3, 4)).square().sum().backward()
        twa.step()

    results = []
    for call in (take, torch.compile(take, backend="aot_eager")):
        torch.manual_seed(0)
        model = torch.nn.Linear(4, 2)
        states = [{name: value + 0.1 * i for name, value in model.state_dict().items()} for i in (1, 2, 4)]
        twa = twa_scale.attach(model, states)
        for _ in range(3):
            call(model, twa)
        results.append(twa.coefficients)
    assert torch.equal(*results) and not torch.equal(results[0], torch.full_like(results[0], 1 / 3))
