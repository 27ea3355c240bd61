"""Training in pods gives the same result as data-parallel training in one shard group."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import isinf
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import update_bn

import twa_scale
from tests import models, reference
from tests.pool import Pool
from tests.ranks import cases
from tests.ranks.cases import Run
from tests.ranks.test_batchnorm import ByKeyword, batches
from tests.ranks.test_reading import save
from twa_scale import CandidateError, ConfigError, EngineError, Snapshots, TwaError
from twa_scale.average.rows.exchange import RowExchange
from twa_scale.config.kinds import RowDtype
from twa_scale.ranks import Group, Pods, Reduction

LAYOUTS: dict[str, list[tuple[str, int]]] = {  # the engine and the ranks of every pod
    "2 x 2 fsdp2": [("fsdp2", 2)] * 2,
    "2 x 2 ddp": [("ddp", 2)] * 2,
    "3 x 1 plain": [("plain", 1)] * 3,
    "3 x 1 fsdp2": [("fsdp2", 1)] * 3,
    "uneven": [("fsdp2", 1), ("fsdp2", 2)],
    "mixed": [("plain", 1), ("ddp", 1), ("fsdp2", 2)],
}
SLOW = {"2 x 2 ddp", "3 x 1 plain", "3 x 1 fsdp2", "mixed", "uneven"}
RUNS = {
    "normalized": Run({"groups": "block"}, steps=5),
    "orthonormal": Run(
        {"basis": "orthonormal", "groups": "tensor", "center": "last", "optimizer": {"lr": 0.005}}, steps=5
    ),
    "simplex": Run(
        {"basis": "simplex", "optimizer": {"name": "sgd", "lr": 0.05, "momentum": 0.9}}, steps=5, accumulate=2
    ),
}
ROWS = Run({"groups": "tensor+row", "max_grad_norm": 0.3, "optimizer": {"row_lr": 0.01}}, steps=5)
Layout = list[tuple[str, int]]


def runs_of(layout: Layout) -> dict[str, Run]:
    """Return the runs that pods of these sizes support. Corrections of rows need equal pods."""
    return RUNS | ({"rows": ROWS} if len({size for _, size in layout}) == 1 else {})


@dataclass
class PodPosition:
    """The position of this rank: the number, engine and ranks of its pod, and its replica group."""

    number: int
    engine: str
    mesh: DeviceMesh
    replica_group: dist.ProcessGroup


def join(layout: Layout) -> PodPosition:
    """Create the groups as a script would: from a 2-D mesh if pods are equal, otherwise from the first ranks."""
    engines, sizes = zip(*layout, strict=True)
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    number = max(i for i, start in enumerate(starts) if start <= dist.get_rank())
    if len(set(sizes)) == 1:
        mesh = init_device_mesh("cpu", (len(sizes), sizes[0]), mesh_dim_names=("pods", "ranks"))
        return PodPosition(number, engines[number], mesh["ranks"], mesh.get_group("pods"))
    pods = [dist.new_group(list(range(start, start + size))) for start, size in zip(starts, sizes, strict=True)]
    return PodPosition(number, engines[number], mesh_of(pods[number]), dist.new_group(starts))


def mesh_of(group: dist.ProcessGroup) -> DeviceMesh:
    """Return a mesh that torch does not confuse with an equal mesh of an earlier process group."""
    return DeviceMesh.from_group(group, "cpu", mesh_dim_names=(f"group {group.group_name}",))


def wrap(model: models.SmallModel, engine: str, mesh: DeviceMesh) -> nn.Module:
    """Wrap the model for the engine of one pod."""
    if engine == "ddp":
        return DistributedDataParallel(model, process_group=mesh.get_group())
    if engine == "fsdp2":
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh, ignored_params={p for p in model.parameters() if p.dim() == 0})
    return model


def attach(place: PodPosition, run: Run, candidates: Sequence[Any] | None = None) -> tuple[nn.Module, Any]:
    model = wrap(models.build(seed=99), place.engine, place.mesh)
    states = models.candidates() if candidates is None else candidates
    return model, twa_scale.attach(model, states, dict(run.config), replica_group=place.replica_group)


def train_all(layout: Layout) -> dict[str, cases.RunResult]:
    place = join(layout)
    results = {}
    for name, run in runs_of(layout).items():
        model, twa = attach(place, run)
        for step in range(run.steps):
            cases.one_step(model, twa, step, run.accumulate)
        results[name] = cases.RunResult(
            cases.gathered(model), twa.coefficients.clone(), corrections=twa.row_corrections()
        )
    return results


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in LAYOUTS])
def test_pods_train_as_one_group_on_all_batches(ranks: Pool, name: str) -> None:
    """Weights equal those of the dense reference and of a single pod; coefficients are bitwise equal on all ranks."""
    layout = LAYOUTS[name]
    size = sum(ranks for _, ranks in layout)
    results = ranks(train_all, size, layout=layout)
    single = ranks(cases.train, size, engine="fsdp2", run=RUNS["normalized"])[0].weights
    for key, run in runs_of(layout).items():
        steps = [cases.micro_batches(step, size, run.accumulate) for step in range(run.steps)]
        expected = reference.train(models.build(), models.loss, models.candidates(), run.config, steps).weights[-1]
        for ended in (result[key] for result in results):
            for tensor, value in expected.items():
                assert (ended.weights[tensor].double() - value).norm() <= 1e-5 * value.norm(), (key, tensor)
            assert torch.equal(ended.coefficients, results[0][key].coefficients), key
            corrections = results[0][key].corrections
            assert all(torch.equal(value, corrections[tensor]) for tensor, value in ended.corrections.items())
    for tensor, value in single.items():
        assert (results[-1]["normalized"].weights[tensor] - value).norm() <= 1e-5 * value.norm(), tensor


def attach_rows(layout: Layout) -> None:
    attach(join(layout), ROWS)


def test_rows_need_pods_of_equal_size(ranks: Pool) -> None:
    with pytest.raises(ConfigError, match="replica_group of each rank must hold its counterparts"):
        ranks(attach_rows, 3, layout=LAYOUTS["uneven"])


def exchange_often(dtype: RowDtype, forget: bool) -> list[Tensor]:
    """Return the sums over 50 steps of averaged gradients, of exact means, and of the absolute values of these."""
    single, world = Group.alone(), Group.world()
    exchange = RowExchange(dtype, Reduction("auto", Pods(single, world), single, world))
    sums = [torch.zeros(5, 7) for _ in range(3)]
    for step in range(50):
        torch.manual_seed(step)
        of_ranks = (1 + torch.randn(world.size, 5, 7)) * 10.0 ** torch.arange(-3, 4)  # rows of different sizes
        local, mean = of_ranks[world.rank].clone(), of_ranks.mean(0)
        exchange.average_(local)
        if forget:
            exchange.forget()
        for total, value in zip(sums, (local, mean, mean.abs()), strict=True):
            total += value
    return sums


@pytest.mark.parametrize(("dtype", "error"), [("float32", 1e-6), ("bfloat16", 1e-4), ("int8", 1e-3)])
def test_errors_of_rounded_gradients_do_not_add_up(ranks: Pool, dtype: RowDtype, error: float) -> None:
    results = ranks(exchange_often, 3, dtype=dtype, forget=False)
    total, exact, size = results[0]
    assert all(torch.equal(item[0], total) for item in results)
    actual = ((total - exact).abs() / size).max()
    assert actual < error
    if dtype != "float32":
        total, exact, size = ranks(exchange_often, 3, dtype=dtype, forget=True)[0]
        assert ((total - exact).abs() / size).max() > 3 * actual


def exchange_nothing(dtype: RowDtype) -> tuple[int, ...]:
    single, world = Group.alone(), Group.world()
    values = torch.zeros(5, 0)
    RowExchange(dtype, Reduction("auto", Pods(single, world), single, world)).average_(values)
    return values.shape


@pytest.mark.parametrize("dtype", get_args(RowDtype))
def test_ranks_may_have_no_rows(ranks: Pool, dtype: RowDtype) -> None:
    assert ranks(exchange_nothing, 2, dtype=dtype) == [(5, 0)] * 2


def scaled_steps(scales: list[float]) -> dict[str, Tensor]:
    """Return the weights after steps of two pods with these loss scales; infinity makes a step that is skipped."""
    place = join(LAYOUTS["2 x 2 fsdp2"])
    model, twa = attach(place, Run({**ROWS.config, "row_exchange": "int8"}))
    step = 0
    for scale in scales:
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0 if isinf(scale) else scale)
        loss = models.loss(model, models.part(models.batch(step), dist.get_rank(), dist.get_world_size()))
        (scaler.scale(loss) * (torch.inf if isinf(scale) else 1)).backward()
        step += twa.step(scaler)
        twa.zero_grad()
    return cases.gathered(model)


def test_loss_scales_and_skipped_steps_keep_rounding_errors(ranks: Pool) -> None:
    expected = ranks(scaled_steps, 4, scales=[1.0] * 4)[0]
    for weights in ranks(scaled_steps, 4, scales=[1.0, 256.0, torch.inf, 4.0, torch.inf, 1024.0]):
        assert all(torch.equal(weights[name], value) for name, value in expected.items())


def train_rounded(dtype: RowDtype) -> tuple[dict[str, Tensor], list[bool]]:
    """Return the weights after steps of two pods, and whether a step has the same bits from a saved state."""
    place = join(LAYOUTS["2 x 2 fsdp2"])
    model, twa = attach(place, Run({**ROWS.config, "row_exchange": dtype}))
    for step in range(ROWS.steps):
        cases.one_step(model, twa, step)
    weights, state = cases.gathered(model), twa.state_dict()
    cases.one_step(model, twa, ROWS.steps)
    trained = cases.gathered(model)
    twa.load_state_dict(state)
    cases.one_step(model, twa, ROWS.steps)
    return weights, [torch.equal(value, trained[name]) for name, value in cases.gathered(model).items()]


@pytest.mark.slow
def test_rounded_gradients_of_rows_train_nearly_the_same(ranks: Pool) -> None:
    exact, _ = ranks(train_rounded, 4, dtype="float32")[0]
    for dtype, error in (("bfloat16", 1e-4), ("int8", 1e-3)):
        results = ranks(train_rounded, 4, dtype=dtype)
        for weights, same in results:
            assert all(same)
            assert all(torch.equal(value, results[0][0][name]) for name, value in weights.items())
            actual = [float((weights[name] - value).norm() / value.norm()) for name, value in exact.items()]
            assert 0 < max(actual) < error, dtype


def train_and_export(layout: Layout, directory: Path) -> dict[str, Any]:
    """Train, recalibrate BatchNorm statistics, and export. Each pod writes to its own directory."""
    place = join(layout)
    model, twa = attach(place, RUNS["normalized"])
    for step in range(2):
        cases.one_step(model, twa, step)
    rank, size = cases.where()
    seen = twa.recalibrate_batchnorm(batches()[rank::size])
    twa.export(directory / f"pod-{place.number}" / "average")
    snapshots = Snapshots(directory / f"pod-{place.number}", every_n_steps=1, replica_group=place.replica_group)
    snapshots.step(model, 1)
    norm = next(module for module in model.modules() if isinstance(module, nn.BatchNorm2d))
    statistics = [norm.get_buffer(name).clone() for name in ("running_mean", "running_var")]
    state = twa.state_dict()
    cases.one_step(model, twa, 2)
    trained = cases.gathered(model)
    twa.load_state_dict(state)
    cases.one_step(model, twa, 2)
    return {
        "seen": seen,
        "statistics": statistics,
        "same": all(torch.equal(value, trained[name]) for name, value in cases.gathered(model).items()),
    }


@pytest.mark.parametrize("name", ["2 x 2 fsdp2", pytest.param("uneven", marks=pytest.mark.slow), "mixed"])
def test_one_pod_writes_and_all_share_statistics(ranks: Pool, tmp_path: Path, name: str) -> None:
    layout = LAYOUTS[name]
    size = sum(ranks for _, ranks in layout)
    results = ranks(train_and_export, size, layout=layout, directory=tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pod-0"]
    written = load_file(tmp_path / "pod-0" / "average" / "model.safetensors")
    snapshot = load_file(tmp_path / "pod-0" / "step-00000001" / "model.safetensors")
    model = models.build()
    model.load_state_dict(written)
    shared = batches()[: 6 // size * size]  # every rank stops when the first one has no batch left
    update_bn(shared, ByKeyword(model))
    norm = model.stem.norm
    for result in results:
        assert result["seen"] == len(shared) and result["same"]
        torch.testing.assert_close(result["statistics"], [norm.running_mean, norm.running_var], rtol=1e-5, atol=1e-6)
    for tensor, value in snapshot.items():
        torch.testing.assert_close(value, written[tensor], rtol=0, atol=0)
    torch.testing.assert_close(written["stem.norm.running_var"], norm.running_var, rtol=1e-5, atol=1e-6)


def attach_to(layout: Layout, paths: list[list[Path]], configs: list[dict[str, Any]] | None = None) -> None:
    """Attach to different candidates, and with different settings, on each rank."""
    rank = dist.get_rank()
    attach(join(layout), Run(configs[rank] if configs else {}), paths[rank])


@pytest.mark.parametrize("name", ["2 x 2 fsdp2", "2 x 2 ddp", "uneven", "mixed"])
def test_reading_error_of_one_rank_stops_all_pods(ranks: Pool, tmp_path: Path, name: str) -> None:
    size = sum(ranks for _, ranks in LAYOUTS[name])
    paths = save(tmp_path, models.candidates())
    inputs = [paths] * (size - 1) + [[Path("elsewhere") / path.name for path in paths]]
    error = ranks.error(attach_to, size, layout=LAYOUTS[name], paths=inputs)
    assert isinstance(error, CandidateError) and "elsewhere" in str(error)


@pytest.mark.parametrize("change", ["an element", "the order", "the number"])
def test_pods_with_different_candidates_are_refused(ranks: Pool, tmp_path: Path, change: str) -> None:
    """Each pod may read its own disk, with equal candidates."""
    (tmp_path / "here").mkdir()
    (tmp_path / "there").mkdir()
    directory = save(tmp_path / "here", models.candidates())
    states = models.candidates()
    if change == "an element":
        states[2]["blocks.1.down.weight"].view(-1)[-1] += 1e-4
    elif change == "the order":
        states[2], states[3] = states[3], states[2]
    else:
        states = states[:3]
    other_directory = save(tmp_path / "there", states)
    error = ranks.error(attach_to, 3, layout=LAYOUTS["uneven"], paths=[directory, other_directory, other_directory])
    assert isinstance(error, CandidateError) and "there" in str(error) and "pod 1" in str(error)
    if change == "an element":
        assert other_directory[2].name in str(error) and "blocks.1.down.weight" in str(error)


@pytest.mark.parametrize(("key", "values"), [("groups", ("block", "tensor")), ("comm", ("auto", "gloo"))])
def test_pods_with_different_settings_are_refused(
    ranks: Pool, tmp_path: Path, key: str, values: tuple[str, str]
) -> None:
    """The error is raised before pods create groups or read candidates, which would hang."""
    paths = [save(tmp_path, models.candidates())] * 3
    configs = [{key: value} for value in (values[0], values[1], values[1])]
    error = ranks.error(attach_to, 3, layout=LAYOUTS["uneven"], paths=paths, configs=configs)
    assert isinstance(error, ConfigError) and key in str(error) and "pod 1" in str(error)


def attach_in_a_wrong_group(wrong: str) -> None:
    """Make two pods of two ranks, with an invalid replica group."""
    pods = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    mesh = mesh_of(pods[dist.get_rank() // 2])
    model = wrap(models.build(), "fsdp2", mesh)
    groups = {
        "everybody": dist.group.WORLD,
        "itself": pods[dist.get_rank() // 2],
        "second ranks": dist.new_group([1, 3]),
        "crossed": [dist.new_group([0, 3]), dist.new_group([1, 2])][dist.get_rank() in (1, 2)],
    }
    twa_scale.attach(model, models.candidates(), replica_group=groups[wrong])


@pytest.mark.parametrize("wrong", ["everybody", "itself", "second ranks", "crossed"])
def test_invalid_replica_group(ranks: Pool, wrong: str) -> None:
    error = ranks.error(attach_in_a_wrong_group, 4, wrong=wrong)
    assert isinstance(error, EngineError) and "replica_group" in str(error)


def overflow(layout: Layout) -> tuple[str, bool]:
    """Make the loss of the last rank infinite; return the error, and whether the coefficients are unchanged."""
    model, twa = attach(join(layout), RUNS["normalized"])
    before = twa.coefficients
    rank, size = cases.where()
    loss = models.loss(model, models.part(models.batch(1), rank, size))
    (loss * float("inf") if rank == size - 1 else loss).backward()
    try:
        twa.step()
    except TwaError as error:
        return str(error), torch.equal(twa.coefficients, before)
    return "", False


@pytest.mark.parametrize("name", ["2 x 2 ddp", "mixed"])
def test_infinite_gradient_of_one_pod_is_refused_in_all(ranks: Pool, name: str) -> None:
    results = ranks(overflow, 4, layout=LAYOUTS[name])
    assert len({message for message, _ in results}) == 1 and "not finite" in results[0][0]
    assert all(stayed for _, stayed in results)
