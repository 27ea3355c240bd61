"""Parts of tensors on meshes: their spans tile every tensor, and reads and writes by spans are exact."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Partial, Shard

import twa_scale
from tests import meshes, models
from tests.grid import rest_slow
from tests.pool import Pool
from tests.ranks import cases
from tests.ranks.cases import Run
from tests.ranks.test_reading import save
from tests.slices import opened, read
from twa_scale import EngineError
from twa_scale.base.spans import Span
from twa_scale.engines import choose_engine
from twa_scale.output.snapshots import Snapshots

PLACES = [(engine, size) for engine in meshes.ENGINES for size in meshes.SIZES[engine]]


def elements(span: Span) -> list[int]:
    return [i for start, stop in span.runs() for i in range(start, stop)]


def held(engine: str) -> tuple[int, list[Span], list[str]]:
    """Return the pod and the spans of this rank, and the names of spans with wrong values."""
    model = models.wrap(models.build(), engine)
    whole = {name: value.flatten() for name, value in cases.gathered(model).items()}
    stored = choose_engine(model)
    wrong = [s.name for s in stored.spans() if not torch.equal(stored.live(s), whole[s.name][elements(s)])]
    return stored.replica_group.rank, stored.spans(), wrong


@pytest.mark.parametrize(("engine", "size"), PLACES)
def test_spans_of_a_pod_cover_every_tensor_once(ranks: Pool, engine: str, size: int) -> None:
    results = ranks(held, size, engine=engine)
    assert [wrong for _, _, wrong in results] == [[]] * size
    assert len({pod for pod, _, _ in results}) == (2 if engine.startswith("hsdp") else 1)
    for pod in {pod for pod, _, _ in results}:
        for name, p in models.build().named_parameters():
            spans = [span for number, spans, _ in results if number == pod for span in spans if span.name == name]
            assert sorted(i for span in spans for i in elements(span)) == list(range(p.numel())), name
    strided = {span.name for _, spans, _ in results for span in spans if span.run}
    assert (not strided) == (engine == "hsdp"), strided


def train_and_write(engine: str, paths: list[Path], out: Path) -> tuple[int, int, dict[str, Tensor], dict[str, Tensor]]:
    """Attach to files, train, write the average and a candidate; return pod, bytes read, and weights before, after."""
    model, twa = cases.attach(engine, Run({"groups": "block"}), paths)
    first = cases.gathered(model)
    for step in range(2):
        cases.one_step(model, twa, step)
    twa.export(out / "average")
    twa.export(out / "dcp", format="dcp")
    Snapshots(out, every_n_steps=1).save(model, 2)
    return twa.pods.number, twa.bytes_read, first, cases.gathered(model)


@pytest.mark.parametrize(
    ("engine", "size"),
    rest_slow(
        [("hsdp", 4), ("columns-tp", 4), ("hsdp-tp", 4), ("tp", 2)],
        lambda engine, _: engine in ("columns-tp", "hsdp"),  # strided spans, and two pods
    ),
)
def test_files_are_read_once_and_written_whole(ranks: Pool, tmp_path: Path, engine: str, size: int) -> None:
    states = models.candidates()
    paths = save(tmp_path, states)
    results = ranks(train_and_write, size, engine=engine, paths=paths, out=tmp_path)
    values = [value for state in states for name, value in state.items() if name != "head.weight"]
    nbytes = sum(value.nbytes for value in values)
    for pod in {pod for pod, *_ in results}:
        assert sum(read for number, read, *_ in results if number == pod) == nbytes
    dcp = opened(tmp_path / "dcp")
    average, snapshot = (load_file(tmp_path / name / "model.safetensors") for name in ("average", "step-00000002"))
    for _, _, first, last in results:
        for name, value in last.items():
            mean = torch.stack([state[name].double() for state in states]).mean(0)
            torch.testing.assert_close(first[name].double(), mean, rtol=1e-6, atol=1e-7)
            assert torch.equal(average[name], value) and torch.equal(snapshot[name], value), name
            assert torch.equal(read(dcp, name, 0, value.numel()), value.flatten()), name
    assert not torch.equal(results[0][2]["blocks.1.down.weight"], results[0][3]["blocks.1.down.weight"])


def attach_twice() -> bool:
    """Return whether a second engine of a model uses the same process group."""
    model = models.wrap(models.build(), "fsdp2-tp")
    choose_engine(model)
    before = dist.distributed_c10d._world.group_count
    choose_engine(model)
    return bool(dist.distributed_c10d._world.group_count == before)


def test_engines_of_one_model_share_its_group(ranks: Pool) -> None:
    assert ranks(attach_twice, 4) == [True] * 4


def accumulate(engine: str, end: str) -> Any:
    """Make two backward passes, the first without reduction. It is dropped, or the second is not reduced either."""
    model, twa = cases.attach(engine, Run({"groups": "block"}))
    assert isinstance(model, FSDPModule)
    place = meshes.data_place(model, *cases.where())
    switch = model.set_requires_all_reduce if end == "stepped, partial" else model.set_requires_gradient_sync
    switch(False)
    models.loss(model, models.part(models.batch(50), *place)).backward()
    if end.startswith("stepped"):
        twa.step()
    twa.zero_grad()
    switch(True)
    cases.one_step(model, twa, 0)
    return cases.gathered(model), twa.coefficients


@pytest.mark.parametrize("bf16", [pytest.param(False, marks=pytest.mark.slow), True])
def test_zero_grad_drops_unreduced_gradients(ranks: Pool, bf16: bool) -> None:
    """With a reduce_dtype, FSDP2 holds unreduced gradients in another attribute."""
    after_both, after_one = (ranks(drop_gradients, 2, bf16=bf16, unreduced=unreduced) for unreduced in (True, False))
    for after, once in zip(after_both, after_one, strict=True):
        assert all(torch.equal(after[name], value) for name, value in once.items())


def drop_gradients(bf16: bool, unreduced: bool) -> dict[str, Tensor]:
    model, twa = cases.attach("fsdp2", Run({"groups": "block"}, bf16=bf16))
    if unreduced:
        model.set_requires_gradient_sync(False)  # type: ignore[operator]
        models.loss(model, models.batch(50)).backward()
        model.set_requires_gradient_sync(True)  # type: ignore[operator]
        twa.zero_grad()
    cases.one_step(model, twa, 0)
    return cases.gathered(model)


@pytest.mark.parametrize(("engine", "size", "end"), [("fsdp2", 2, "stepped"), ("hsdp", 4, "stepped, partial")])
def test_a_step_on_gradients_that_were_not_reduced_is_refused(ranks: Pool, engine: str, size: int, end: str) -> None:
    error = ranks.error(accumulate, size, engine=engine, end=end)
    assert isinstance(error, EngineError) and "set_requires_gradient_sync(True)" in str(error)


def refuse(kind: str) -> None:
    """Attach to a model with unsupported placements."""
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    model: nn.Module = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 4, bias=False))
    group = None
    match kind:
        case "pods over HSDP":
            fully_shard(model, mesh=init_device_mesh("cpu", (2, 1), mesh_dim_names=("pods", "dp")))
            group = dist.group.WORLD
        case "partial":
            model[1].weight = nn.Parameter(DTensor.from_local(model[1].weight.detach(), mesh, [Partial()]))  # type: ignore[index]
        case "uneven":
            rows = torch.zeros(1 if dist.get_rank() == 0 else 3, 6)
            local = DTensor.from_local(rows, mesh, [Shard(0)], shape=torch.Size((4, 6)), stride=(6, 1))
            model[1].weight = nn.Parameter(local)  # type: ignore[index]
    twa_scale.attach(model, [nn.Linear(2, 2).state_dict()] * 2, replica_group=group)


@pytest.mark.parametrize(
    ("kind", "named"),
    [
        ("pods over HSDP", ["replica_group", "HSDP"]),
        ("partial", ["1.weight", "Shard"]),
        ("uneven", ["1.weight", "torch.chunk"]),
    ],
)
def test_unsupported_placements_are_refused(ranks: Pool, kind: str, named: list[str]) -> None:
    error = ranks.error(refuse, 2, kind=kind)
    assert isinstance(error, EngineError)
    assert all(part in str(error) for part in named), str(error)
