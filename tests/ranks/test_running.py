"""Running averages on every engine equal those of the whole weights, resume with the same bits, and can be trained."""

import warnings
from collections.abc import Callable, Sequence
from functools import partial
from math import log
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import twa_scale
from tests import models, zero
from tests.grid import rest_slow
from tests.pool import Pool
from tests.ranks import cases
from twa_scale.base.spans import Span
from twa_scale.config import center_weights
from twa_scale.engines import choose_engine
from twa_scale.engines.zero import is_deepspeed
from twa_scale.output.shared import require_shared
from twa_scale.running import learning

STEPS = 8
EMA: dict[str, Any] = {"decays": [0.5, 0.9], "half_life": 0.3, "bema": True, "use_buffers": True}
WINDOW = {"every": 2, "keep": 3, "store": "dense32"}
KEPT = [3, 5, 7]  # the weights of steps 4, 6 and 8
CONFIG = {"groups": "block", "basis": "orthonormal", "optimizer": {"name": "sgd", "lr": 0.005}}
ROWS = {"groups": "tensor+row", "center": "ema:0.5", "optimizer": {"name": "sgd", "lr": 0.002, "row_lr": 0.02}}
CONFIGS: dict[str, dict[str, Any]] = {"blocks": CONFIG, "rows": ROWS}
AVERAGES: dict[str, list[float]] = {
    "mean": [1 / 3] * 3,
    "minus-sqrt": center_weights("minus-sqrt", 3),
    "lawa:2": [0.0, 0.5, 0.5],
    "window:ema:0.5": center_weights("ema:0.5", 3),
    "0": [1.0, 0.0, 0.0],
    "explicit": [0.5, -0.2, 0.9],
}
EXPORTED = ("ema:0.5", "mean")
STATISTIC = "stem.norm.running_var"
ENGINES = [
    ("plain", 1),
    ("plain", 2),
    ("ddp", 3),
    ("fsdp2", 1),
    ("fsdp2", 3),
    ("columns-tp", 4),
    ("fsdp1", 2),
    ("fsdp1-flat", 3),
    ("sharded-ddp", 2),
    ("zero1", 2),
    ("zero2", 3),
    ("zero3", 3),
]
QUICK = [("plain", 2), ("fsdp2", 3), ("fsdp1-flat", 3), ("zero3", 3)]  # and those that hold whole rows
REST = sorted({(engine, size) for engine, _ in ENGINES if engine != "columns-tp" for size in (1, 2, 3)} - {*ENGINES})


def shape_of(engine: str) -> tuple[int, ...]:
    return (1,) if engine in zero.ENGINES else models.SCALAR_SHAPE


def training(engine: str) -> list[dict[str, Tensor]]:
    """Return the whole weights after each step of a training."""
    return models.candidates(STEPS, scalar_shape=shape_of(engine))


def wrapped(engine: str) -> nn.Module:
    model = models.build(seed=5, scalar_shape=shape_of(engine))
    return models.wrap(model, engine)


def local(values: Tensor, span: Span) -> Tensor:
    flat = values.reshape(-1)
    return torch.cat([flat[start:stop] for start, stop in span.runs()])


def put(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Set the weights as a step of an optimizer does. Every rank sets its own part."""
    engine = choose_engine(model)
    with torch.no_grad():
        for span in engine.spans():
            if engine.parameters[span.name].trainable and len(span):
                engine.live(span).copy_(local(state[span.name], span))
        engine.publish([name for name, info in engine.parameters.items() if info.trainable])
        for name, buffer in engine.buffers().items():
            buffer.copy_(state[name])
    if is_deepspeed(model):
        model.global_steps += 1


def follow(engine: str, directory: Path) -> dict[str, Any]:
    """Follow a training, use each average, continue from a state, and learn the coefficients of the window."""
    model, actual = wrapped(engine), dict[str, Any]()
    averages = twa_scale.RunningAverages(model, ema=EMA, window=WINDOW)
    resumed = None
    for step, state in enumerate(training(engine)):
        if step == 5:
            resumed = twa_scale.RunningAverages(model, ema=EMA, window=WINDOW)
            resumed.load_state_dict(copied(averages.state_dict()))
        put(model, state)
        averages.step()
        if resumed:
            resumed.step()
    assert resumed is not None
    actual["resumed"] = same_bits(averages.state_dict(), resumed.state_dict())
    actual["steps"] = averages.snapshot_steps
    before = everything(model)
    inputs: dict[str, int | Sequence[float]] = {"0": 0, "explicit": AVERAGES["explicit"]}
    for name in (*AVERAGES, "ema:0.5", "ema:0.9", "ema:half-life:0.3", "bema"):
        with averages.weights(inputs.get(name, name)):
            actual[name] = everything(model)
    for name in EXPORTED:
        averages.export(directory / "exported" / name, name)
    actual["restored"] = same_bits(before, everything(model))
    counts = counters(model)
    for name, config in CONFIGS.items():
        twa = averages.learn(config)
        actual[f"learned {name}"] = trained(model, twa)
        averages.restore()
        assert counters(model) == counts
        actual[f"given back from {name}"] = same_bits(before, everything(model))
    saved = [str(path) for path in averages.save(directory)]
    for name, config in CONFIGS.items():
        twa = twa_scale.attach(model, saved, config)
        actual[f"attached {name}"] = trained(model, twa)
        twa.close()
    return actual


def counters(model: Any) -> list[int]:
    names = ("global_steps", "micro_steps", "global_samples") if is_deepspeed(model) else ()
    return [getattr(model, name) for name in names]


def trained(model: nn.Module, twa: Any) -> dict[str, Tensor]:
    for step in range(3):
        cases.one_step(model, twa, step)
    return {"coefficients": twa.coefficients, **everything(model)}


def everything(model: nn.Module) -> dict[str, Tensor]:
    buffers = {name: buffer.clone() for name, buffer in choose_engine(model).buffers().items()}
    return cases.gathered(model) | buffers


def copied(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: copied(value) for key, value in tree.items()}
    return tree.clone() if isinstance(tree, Tensor) else tree


def same_bits(first: Any, second: Any) -> bool:
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same_bits(value, second[key]) for key, value in first.items())
    if isinstance(first, torch.distributed.tensor.DTensor):
        return torch.equal(first.to_local(), second.to_local())
    return torch.equal(first, second) if isinstance(first, Tensor) else bool(first == second)


def averaged_by_torch(engine: str, decay: float) -> dict[str, Tensor]:
    """Return the averages that torch computes of the whole weights."""
    states = training(engine)
    model = models.build(scalar_shape=shape_of(engine))
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)
    for state in states:
        model.load_state_dict(state)
        average.update_parameters(model)
    return dict(average.module.state_dict())


def averaged_by_half_life(engine: str, half_life: float) -> dict[str, Tensor]:
    average: dict[str, Tensor] = {}
    for t, state in enumerate(training(engine), 1):
        d = (1 - 1 / t) ** (log(0.5) / log(1 - half_life))
        average = {name: d * average.get(name, 0) + (1 - d) * value.double() for name, value in state.items()}
    return average


def averaged_without_lag(engine: str) -> dict[str, Tensor]:
    """Return BEMA with the default settings (arXiv 2508.00180)."""
    first, *others = ({name: value.double() for name, value in state.items()} for state in training(engine))
    average = corrected = first
    for t, state in enumerate(others, 1):
        beta, alpha = (10 + t) ** -0.5, (10 + t) ** -0.2
        average = {name: (1 - beta) * average[name] + beta * value for name, value in state.items()}
        corrected = {name: average[name] + alpha * (value - first[name]) for name, value in state.items()}
    return corrected


@pytest.mark.parametrize(
    ("engine", "size"),
    rest_slow(ENGINES, lambda *case: case in QUICK) + [pytest.param(*case, marks=pytest.mark.grid) for case in REST],
)
def test_averages_are_those_of_whole_weights(ranks: Pool, tmp_path: Path, engine: str, size: int) -> None:
    states = training(engine)
    wanted = {"ema:0.5": averaged_by_torch(engine, 0.5), "ema:0.9": averaged_by_torch(engine, 0.9)}
    wanted["ema:half-life:0.3"] = averaged_by_half_life(engine, 0.3)
    wanted["bema"] = averaged_without_lag(engine)
    for name, weights in AVERAGES.items():
        kept = [states[i] for i in KEPT]
        wanted[name] = {
            key: sum((a * state[key].double() for a, state in zip(weights, kept, strict=True)), torch.zeros(()))
            for key, value in states[0].items()
            if value.is_floating_point()
        }
    for actual in ranks(follow, size, engine=engine, directory=tmp_path, timeout=100):
        assert actual["steps"] == [4, 6, 8]
        for name in EXPORTED:
            files = load_file(tmp_path / "exported" / name / "model.safetensors")
            assert all(torch.equal(value, actual[name][key].view(value.shape)) for key, value in files.items())
            assert {key for key, _ in models.build().named_parameters()} <= files.keys()
        assert actual["resumed"] and actual["restored"]
        for name, tensors in wanted.items():
            displayed = {key for key, _ in models.build().named_parameters()} - {models.FROZEN}
            for key in displayed | ({STATISTIC} if name.startswith("ema:") else set()):
                torch.testing.assert_close(
                    actual[name][key].double(),
                    tensors[key].double().view(actual[name][key].shape),
                    rtol=1e-5,
                    atol=1e-6,
                )
        for name in CONFIGS:
            learned = actual[f"learned {name}"]
            assert actual[f"given back from {name}"]
            assert not torch.allclose(learned["coefficients"], learned["coefficients"][:1])
            for key, value in actual[f"attached {name}"].items():
                named = partial("{}: {}: {}".format, name, key)
                torch.testing.assert_close(learned[key], value, rtol=1e-4, atol=1e-5, msg=named)


def save_distributed(directory: Path) -> dict[str, Any]:
    model = wrapped("fsdp2")
    averages = twa_scale.RunningAverages(model, ema=[0.5])
    windowed = twa_scale.RunningAverages(model, window=WINDOW | {"store": "packed4"})
    for state in training("fsdp2"):
        put(model, state)
        averages.step()
        windowed.step()
    dcp.save({"averages": averages, "windowed": windowed}, checkpoint_id=directory)
    return shown(model, averages, "ema") | shown(model, windowed, "mean")


def load_distributed(directory: Path, window: bool) -> dict[str, Any]:
    model = wrapped("fsdp2")
    averages = twa_scale.RunningAverages(model, ema=[0.5])
    stored: dict[str, Any] = {"averages": averages}
    if window:
        stored["windowed"] = twa_scale.RunningAverages(model, window=WINDOW | {"store": "packed4"})
    dcp.load(stored, checkpoint_id=directory)
    assert averages.num_steps == STEPS
    actual = shown(model, averages, "ema")
    return actual | shown(model, stored["windowed"], "mean") if window else actual


def shown(model: nn.Module, averages: Any, which: str) -> dict[str, Tensor]:
    with averages.weights(which):
        return {f"{which} {name}": value for name, value in cases.gathered(model).items()}


def test_a_distributed_checkpoint_carries_the_state(ranks: Pool, tmp_path: Path) -> None:
    wanted = ranks(save_distributed, 2, directory=tmp_path)[0]
    for actual in ranks(load_distributed, 2, directory=tmp_path, window=True):
        assert same_bits(actual, wanted)
    for actual in ranks(load_distributed, 3, directory=tmp_path, window=False):  # the shards of other ranks differ
        assert all(same_bits(value, wanted[name]) for name, value in actual.items())


def saved_with_a_complex_buffer() -> list[bool]:
    """Return whether the averages in the state of a model with a complex buffer are DTensors."""
    model: nn.Module = nn.Linear(6, 4)
    model.register_buffer("frequencies", torch.ones(3, dtype=torch.complex64))
    fully_shard(model)
    averages = twa_scale.RunningAverages(model, ema=[0.5])
    averages.step()
    (average,) = averages.state_dict()["ema"].values()
    return [isinstance(value, DTensor) for value in average["weights"].values()]


def test_complex_buffers_do_not_prevent_resharding(ranks: Pool) -> None:
    assert ranks(saved_with_a_complex_buffer, 2) == [[True, True]] * 2


def apart(directory: Path) -> list[str]:
    """Return the errors of ranks that each have a directory of their own."""
    averages = twa_scale.RunningAverages(wrapped("fsdp2"), ema=[0.5])
    averages.step()
    own = directory / str(averages.pods.rank)
    averages.save_state(directory / "0")
    calls = (
        lambda: averages.load_state(own),
        lambda: require_shared(own, averages.pods),
        lambda: averages.compare(lambda _: float(averages.pods.rank)),
        lambda: averages.compare(lambda _: 1.0 if averages.pods.rank else 1 / 0),
    )
    texts = [raised(call) for call in calls]
    averages.compare(lambda _: 1.0)  # possible again
    return texts


def test_ranks_that_see_different_files_or_scores_are_refused(ranks: Pool, tmp_path: Path) -> None:
    first, second = ranks(apart, 2, directory=tmp_path)
    assert first[:3] == second[:3] and list((tmp_path / "0").glob(".twa-scale-*")) == []
    state, shared, scores, failed = first
    assert "rank 1 sees no state of averages there, but rank 0 does" in state
    assert "not on a shared file system" in shared
    assert "compare: the score is" in scores
    assert "division by zero" in failed and "division by zero" in second[3]


def fully_sharded() -> nn.Module:
    """Return a small FSDP2 model whose statistics differ between ranks."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Linear(16, 8))
    for layer in (model[0], model[2]):
        fully_shard(layer)
    fully_shard(model)
    return model


def parted(engine: str) -> nn.Module:
    return fully_sharded() if engine == "fsdp2" else DistributedDataParallel(nn.Sequential(nn.Linear(8, 16)))


def move(model: nn.Module, averages: Any, steps: int) -> None:
    """Take steps of an optimizer on data of this rank."""
    rank = torch.distributed.get_rank()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(steps):
        torch.manual_seed(100 * step + rank)
        model(torch.randn(4, 8)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        averages.step()


def plain(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: plain(value) for key, value in tree.items()}
    local = tree.to_local() if isinstance(tree, DTensor) else tree
    return local.clone() if isinstance(local, Tensor) else local


def load_of_others(engine: str) -> dict[str, str]:
    """Load the state of the first rank on all ranks, and on each rank a state of another step."""
    model = parted(engine)
    averages = twa_scale.RunningAverages(model, ema=[0.5])
    states = []
    for _ in range(2):
        move(model, averages, 1)
        states.append(plain(averages.state_dict()))
    rank = torch.distributed.get_rank()
    first = twa_scale.ranks.Group.world().broadcast(states[1])
    messages = {
        "rank": cases.error_text(lambda: averages.load_state_dict(first)),
        "step": cases.error_text(lambda: averages.load_state_dict(states[rank])),
    }
    averages.load_state_dict(states[0])
    if rank == 1:
        averages.step()  # without waiting for another rank
    assert averages.num_steps == 1 + rank
    return messages


@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_states_of_another_rank_or_step_are_refused_on_every_rank(ranks: Pool, engine: str) -> None:
    first, second = ranks(load_of_others, 2, engine=engine)
    assert first == second and "Each rank saves and loads its own state" in first["rank"]
    assert "of different steps: step is 2 on rank 1 and 1 on rank 0" in first["step"]


def replace_parameters(model: nn.Module) -> None:
    model.load_state_dict({name: value.clone() for name, value in model.state_dict().items()}, assign=True)


def change_type(model: nn.Module) -> None:
    model.to(torch.float64)


def refuse_replaced() -> list[str]:
    messages = []
    for change in (replace_parameters, change_type):
        model = fully_sharded()
        averages = twa_scale.RunningAverages(model, ema=[0.5])
        move(model, averages, 1)
        model(torch.ones(4, 8))  # the root remains gathered
        averages.step()
        change(model)
        messages.append(cases.error_text(averages.step))
    model = nn.Sequential(nn.Linear(8, 16))
    averages = twa_scale.RunningAverages(model, ema=[0.5])
    fully_shard(model)
    return [*messages, cases.error_text(averages.step)]


def test_parameters_that_are_replaced_in_fsdp2_are_refused(ranks: Pool) -> None:
    for messages in ranks(refuse_replaced, 2):
        assert len(messages) == 3 and all("was replaced" in text for text in messages)


WITH_BUFFERS = {"decays": 0.5, "use_buffers": True}
MEAN = "1.running_mean"


def statistics_of_ranks(directory: Path) -> dict[str, Any]:
    model = fully_sharded()
    averages = twa_scale.RunningAverages(model, ema=WITH_BUFFERS)
    move(model, averages, 2)
    dcp.save({"averages": averages}, checkpoint_id=directory)
    with averages.weights("ema"):
        actual: dict[str, Any] = {"own": model.get_buffer(MEAN).clone()}
    resumed = twa_scale.RunningAverages(model, ema=WITH_BUFFERS)
    dcp.load({"averages": resumed}, checkpoint_id=directory)
    with resumed.weights("ema"):
        actual["resumed"] = model.get_buffer(MEAN).clone()
    other = twa_scale.RunningAverages(model, ema=WITH_BUFFERS | {"bias_correction": True})
    other.step()
    for call in (lambda: dcp.load({"averages": other}, checkpoint_id=directory), lambda: see(other)):
        actual.setdefault("said", []).append(raised(call))
    other = twa_scale.RunningAverages(model, ema=WITH_BUFFERS)
    return actual | {"trained": model.get_buffer(MEAN).clone()}


def see(averages: Any) -> None:
    with averages.weights("ema"):
        pass


def raised(call: Callable[[], object]) -> str:
    try:
        call()
    except Exception as error:
        return str(error)
    return ""


def test_statistics_of_ranks_are_those_of_the_first(ranks: Pool, tmp_path: Path) -> None:
    first, second = ranks(statistics_of_ranks, 2, directory=tmp_path)
    assert not torch.equal(first["trained"], second["trained"])
    assert all(torch.equal(first["own"], result) for result in (second["own"], first["resumed"], second["resumed"]))
    for actual in (first, second):  # torch has read into the averages before the state was refused
        assert "saved with ema=" in actual["said"][0] and "a state that does not fit" in actual["said"][1]


def fail_on_one(where: str) -> dict[str, Any]:
    """After an error on one rank in learn() or weights(), all ranks have their weights again and continue to train."""
    model = fully_sharded()
    averages = twa_scale.RunningAverages(model, ema=[0.5], window={"every": 1, "keep": 3, "store": "dense32"})
    move(model, averages, 3)
    before = everything(model)

    def fail(*_: Any) -> None:
        if torch.distributed.get_rank() == 1:
            raise torch.OutOfMemoryError("on one rank")

    if where == "weights":
        with averages.weights("ema"):
            message = raised(lambda: fail_in(averages, fail))
    else:
        work = getattr(learning, where)

        def failing(*args: Any) -> Any:
            ended = work(*args)
            fail()
            return ended

        setattr(learning, where, failing)
        try:
            message = raised(averages.learn)
        finally:
            setattr(learning, where, work)
    restored = same_bits(before, everything(model))
    move(model, averages, 1)
    moved = everything(model)
    see(averages)
    averages.restore()
    kept = same_bits(moved, everything(model)) and not same_bits(before, moved)
    averages.learn()
    averages.restore()
    return {"said": message, "restored": restored, "kept": kept}


def fail_in(averages: Any, fail: Callable[[], None]) -> None:
    with averages.weights("mean"):
        fail()


@pytest.mark.parametrize("location", ["weights", "_measured", "assemble"])
def test_an_error_on_one_rank_leaves_the_weights_of_all(ranks: Pool, location: str) -> None:
    for actual in ranks(fail_on_one, 2, where=location):
        assert "on one rank" in actual["said"] and actual["restored"] and actual["kept"]


def wrapped_in_ddp(first: bool) -> list[str]:
    """Return the notices about averages of the module in a DistributedDataParallel, made before or after it."""
    model = nn.Linear(3, 2)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", twa_scale.TwaWarning)
        if first:
            ddp, averages = DistributedDataParallel(model), twa_scale.RunningAverages(model, ema=[0.5])
        else:
            averages = twa_scale.RunningAverages(model, ema=[0.5])
            ddp = DistributedDataParallel(model)
        optimizer = torch.optim.SGD(ddp.parameters(), 0.1)
        for _ in range(2):
            ddp(torch.ones(1, 3)).sum().backward()
            optimizer.step()
            averages.step()
    return [str(warning.message) for warning in caught if issubclass(warning.category, twa_scale.TwaWarning)]


@pytest.mark.parametrize("first", [True, False])
def test_averages_of_the_module_in_a_wrapper_are_reported_once(ranks: Pool, first: bool) -> None:
    messages, other = ranks(wrapped_in_ddp, 2, first=first)
    assert len(messages) == 1 and "that a DistributedDataParallel wraps" in messages[0] and not other


def exported_with_a_file_of_the_first_rank(out: Path) -> None:
    torch.manual_seed(0)
    averages = twa_scale.RunningAverages(nn.Linear(2, 2), ema=[0.5], window={"every": 1, "keep": 2})
    files = {"notes.txt": out / "notes.txt" if averages.pods.rank == 0 else out / "missing"}
    for _ in range(2):
        averages.step()
    averages.export(out / "ema", "ema", files=files)
    with averages.learning(files=files) as twa:
        twa.export(out / "learned")


@pytest.mark.filterwarnings("ignore")
def test_only_the_first_rank_reads_small_files(ranks: Pool, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("a run")
    ranks(exported_with_a_file_of_the_first_rank, 2, out=tmp_path)
    for name in ("ema", "learned"):
        assert (tmp_path / name / "notes.txt").read_text() == "a run"


def compared_with_nan() -> str:
    averages = twa_scale.RunningAverages(nn.Linear(2, 2), ema=[0.5])
    averages.step()
    with pytest.raises(twa_scale.ConfigError) as refused:
        averages.compare(lambda _: float("nan") if averages.pods.rank == 0 else 1.0)
    return str(refused.value)


def test_a_score_of_one_rank_that_is_not_finite_is_named_with_its_rank(ranks: Pool) -> None:
    for message in ranks(compared_with_nan, 2):
        assert "the score is 1.0 on rank 1" in message and "nan on rank 0" in message
