"""Candidates are read once, by slices. Every rank has the same error for an invalid candidate."""

import warnings
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import twa_scale
from tests import flattened, models
from tests.grid import rest_slow
from tests.pool import Pool
from tests.ranks import cases
from tests.ranks.cases import Run
from twa_scale import CandidateError, TwaError

ENGINES = ["plain", "ddp", "fsdp2", *flattened.ENGINES]
EACH_KIND = rest_slow([(engine,) for engine in ENGINES], lambda engine: engine in ("plain", "fsdp2", "fsdp1-flat"))
SIZES = [1, 2, 3]


def save(directory: Path, states: list[dict[str, Tensor]]) -> list[Path]:
    """Write one file for each state dict, with tied tensors once: step-10, step-20, .."""
    paths = [directory / f"step-{10 * (i + 1)}.safetensors" for i in range(len(states))]
    for path, state in zip(paths, states, strict=True):
        save_file({name: value.contiguous() for name, value in state.items() if name != "head.weight"}, path)
    return paths


def wide() -> nn.Module:
    """Return about a million numbers. The 501 rows cannot be divided evenly by two ranks."""
    return nn.Sequential(nn.Linear(700, 501), nn.Linear(501, 1200), nn.Linear(1200, 1))


def attach_wide(engine: str, paths: list[Path]) -> tuple[int, int]:
    """Return the bytes that attaching read, by the candidates' counters and by the kernel's."""
    model = wide()
    if engine == "ddp":
        model = DistributedDataParallel(model)
    elif engine == "fsdp2":
        fully_shard(model)
    elif engine in flattened.ENGINES:
        model = flattened.wrap_module(model, engine)
    torch.manual_seed(0)  # replicas must have the same candidates
    twa_scale.attach(nn.Linear(2, 2), candidates=[nn.Linear(2, 2).state_dict()] * 2)  # imports read files, too
    before = kernel_count()
    messages: list[tuple[int, int]] = []
    twa = twa_scale.attach(model, candidates=paths, progress=lambda nbytes, total: messages.append((nbytes, total)))
    assert sum(nbytes for nbytes, _ in messages) == twa.bytes_read
    assert {total for _, total in messages} <= {twa.bytes_read}
    return twa.bytes_read, kernel_count() - before


def kernel_count() -> int:
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("rchar")).split()[1])


PLACES = rest_slow(
    product(ENGINES, SIZES), lambda engine, size: size == {"plain": 1, "fsdp2": 3, "fsdp1-flat": 3}.get(engine, 2)
)


@pytest.mark.parametrize(("engine", "size"), PLACES)
def test_each_byte_is_read_by_one_rank_of_a_shard_group_once(
    ranks: Pool, tmp_path: Path, engine: str, size: int
) -> None:
    n = 3
    base = wide().state_dict()
    paths = save(tmp_path, [{k: v + 0.01 * i * torch.randn_like(v) for k, v in base.items()} for i in range(n)])
    total = n * sum(value.nbytes for value in base.values())
    counted, kernel = zip(*ranks(attach_wide, size, engine=engine, paths=paths), strict=True)
    if engine == "plain":  # every rank is a separate shard group
        assert all(count == total for count in counted)
        assert all(total <= count <= 1.02 * total for count in kernel)
        return
    assert sum(counted) == total
    if engine == "sharded-ddp":  # assigns whole tensors
        return
    assert max(counted) <= 1.05 * total / size
    if engine != "ddp":  # the exchange of weights uses the same counter
        assert total <= sum(kernel) <= 1.02 * total + size * 100_000


def attach_judged(engine: str, paths: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the weights and the buffers."""
    model, _ = cases.attach(engine, Run({}), paths)
    buffers = {flattened.plain(name): value.clone() for name, value in model.named_buffers()}
    return cases.gathered(model), buffers


@pytest.mark.parametrize(("engine", "size"), PLACES)
def test_attach_writes_the_mean_over_what_the_model_had(ranks: Pool, tmp_path: Path, engine: str, size: int) -> None:
    """Files have the tied tensor once. Frozen tensors are averaged, and integers are those of the last."""
    states = models.candidates()
    save(tmp_path, states)
    for weights, buffers in ranks(attach_judged, size, engine=engine, paths=str(tmp_path / "step-*.safetensors")):
        for name, value in weights.items():
            mean = torch.stack([state[name].double() for state in states]).mean(0)
            torch.testing.assert_close(value.double(), mean, rtol=1e-6, atol=1e-7)
        var, count = "stem.norm.running_var", "stem.norm.num_batches_tracked"
        torch.testing.assert_close(buffers[var], torch.stack([state[var] for state in states]).mean(0))
        assert torch.equal(buffers[count], states[-1][count])


def attach_cast(engine: str, dtype: torch.dtype, states: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    model = models.wrap(models.build(seed=99).to(dtype), engine)
    twa_scale.attach(model, candidates=states)
    return cases.gathered(model)


@pytest.mark.parametrize("engine", EACH_KIND)
def test_bfloat16_weights_are_rounded_once(ranks: Pool, engine: str) -> None:
    states = models.candidates()
    for weights in ranks(attach_cast, 2, engine=engine, dtype=torch.bfloat16, states=states):
        for name, value in weights.items():
            mean = torch.stack([state[name].double() for state in states]).mean(0)
            assert value.dtype == torch.bfloat16
            assert bool(((value.double() - mean).abs() <= 1.001 * 2**-8 * mean.abs()).all()), name


@pytest.mark.parametrize("engine", EACH_KIND)
def test_candidates_may_be_bfloat16_and_saved_from_a_wrapper(ranks: Pool, engine: str) -> None:
    states = [{f"module.{k}": v.bfloat16() for k, v in s.items() if v.is_floating_point()} for s in models.candidates()]
    for weights in ranks(attach_cast, 2, engine=engine, dtype=torch.float32, states=states):
        for name, value in weights.items():
            mean = torch.stack([state[f"module.{name}"].double() for state in states]).mean(0)
            torch.testing.assert_close(value.double(), mean, rtol=1e-6, atol=1e-7)


def damage(kind: str, paths: list[Path]) -> tuple[list[Path], list[str]]:
    """Damage the candidates. Return them and the expected words of the message."""
    spoiled = paths[2]
    state = load_file(spoiled)
    match kind:
        case "nan" | "inf":
            state["blocks.1.up.weight"][13, 5] = float(kind)
            names = [spoiled.name, "blocks.1.up.weight"]
        case "missing":
            del state["blocks.1.up.bias"]
            names = [spoiled.name, "blocks.1.up.bias"]
        case "extra":
            state["blocks.1.upper.bias"] = torch.zeros(3)
            names = [spoiled.name, "blocks.1.upper.bias"]
        case "shape":
            state["blocks.1.up.bias"] = torch.zeros(17)
            names = [spoiled.name, "blocks.1.up.bias", "16", "17"]
        case "dtype":
            state["blocks.1.up.bias"] = torch.zeros(16, dtype=torch.int64)
            names = [spoiled.name, "blocks.1.up.bias"]
        case "truncated" | "garbage":
            whole = spoiled.read_bytes()
            spoiled.write_bytes(whole[: len(whole) - 99] if kind == "truncated" else b"\xff" * 200)
            return paths, [spoiled.name]
        case "none":
            return [], []
        case "one":
            return paths[:1], []
        case "gone":
            spoiled.unlink()
            return paths, [spoiled.name]
        case _:
            for path in paths:  # all the same, but different from the model
                state = load_file(path)
                value = state.pop("blocks.1.up.bias")
                if kind == "all-renamed":
                    state["blocks.1.upp.bias"] = value
                elif kind == "all-wider":
                    state["blocks.1.up.bias"] = torch.zeros(17)
                save_file(state, path)
            return paths, ["blocks.1.up.bias"]
    save_file(state, spoiled)
    return paths, names


KINDS = ["nan", "inf", "missing", "extra", "shape", "dtype", "truncated", "garbage", "none", "one", "gone"]
KINDS += ["all-renamed", "all-wider", "all-missing"]


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[list[Path], list[str]]]:
    """Return candidates that are damaged in each way, and the expected words of the messages."""
    return {kind: damage(kind, save(tmp_path_factory.mktemp(kind), models.candidates())) for kind in KINDS}


def refusals(engine: str, runs: list[tuple[dict[str, Any], Any]]) -> list[tuple[str, str]]:
    """Return the class and the message of the error of attaching with each configuration and candidates."""
    actual = []
    for config, paths in runs:
        try:
            cases.attach(engine, Run(config), paths)
        except TwaError as error:
            actual.append((type(error).__name__, str(error)))
        else:
            actual.append(("", "is not refused"))
    return actual


@pytest.mark.parametrize(
    ("engine", "size"),
    rest_slow(
        [("plain", 1), ("plain", 2), ("ddp", 2), ("fsdp2", 2), ("fsdp2", 3)],
        lambda engine, size: size == {"plain": 1, "fsdp2": 3}.get(engine),
    ),
)
def test_a_bad_candidate_is_the_same_error_on_every_rank(
    ranks: Pool, damaged: dict[str, tuple[list[Path], list[str]]], engine: str, size: int
) -> None:
    by_rank = ranks(refusals, size, engine=engine, runs=[({}, paths) for paths, _ in damaged.values()])
    assert all(actual == by_rank[0] for actual in by_rank), by_rank
    for (kind, (_, names)), (error, messages) in zip(damaged.items(), by_rank[0], strict=True):
        assert error == "CandidateError", f"{kind}: {error} {messages}"
        assert all(name in messages for name in names), f"{kind}: {messages}"


def attach_where_one_rank_sees_no_file(engine: str, paths: list[Path]) -> None:
    rank, _ = cases.where()
    cases.attach(engine, Run({}), paths if rank != 1 else [Path("elsewhere") / path.name for path in paths])


@pytest.mark.parametrize("engine", ENGINES)
def test_read_error_of_one_rank_is_raised_on_all(ranks: Pool, tmp_path: Path, engine: str) -> None:
    paths = save(tmp_path, models.candidates())
    error = ranks.error(attach_where_one_rank_sees_no_file, 3, engine=engine, paths=paths)
    assert isinstance(error, CandidateError) and "elsewhere" in str(error)


def test_a_wrong_setting_is_a_config_error_on_every_rank(ranks: Pool) -> None:
    configs: list[dict[str, Any]] = [
        {"bassis": "pca"},
        {"basis": "pcaa"},
        {"center": 7},
        {"center": [0.5, 0.5]},
        {"groups": ["no such tensor"]},
        {"include": ["no such tensor"]},
        {"exclude": [""]},
        {"basis": "pca", "num_components": 9},
        {"optimizer": {"name": "adamv"}},
        {"optimizer": {"name": "sgd", "momentun": 0.9}},
        {"start": -9},
        {"basis": "simplex", "start": "last"},
        {"groups": ["("]},
    ]
    first, second = ranks(refusals, 2, engine="fsdp2", runs=[(config, None) for config in configs])
    assert first == second
    for config, (error, messages) in zip(configs, first, strict=True):
        assert error == "ConfigError", f"{config}: {error} {messages}"


def train_with_twins(engine: str, basis: str, paths: list[Path]) -> tuple[list[str], bool]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model, twa = cases.attach(engine, Run({"basis": basis, "groups": "tensor"}), paths)
    for step in range(3):
        cases.one_step(model, twa, step)
    finite = all(bool(value.isfinite().all()) for value in [*cases.gathered(model).values(), twa.coefficients])
    return [str(warning.message) for warning in caught if "same" in str(warning.message)], finite


@pytest.mark.parametrize(
    "basis",
    rest_slow(
        [("normalized",), ("orthonormal",), ("pca",), ("simplex",)], lambda basis: basis in ("normalized", "pca")
    ),
)
def test_two_identical_candidates_work_with_a_warning_that_names_both(ranks: Pool, tmp_path: Path, basis: str) -> None:
    states = models.candidates()
    paths = save(tmp_path, [*states[:3], states[1]])
    results = ranks(train_with_twins, 2, engine="fsdp2", basis=basis, paths=paths)
    captured = [message for messages, _ in results for message in messages]
    assert len(captured) == 1 and paths[1].name in captured[0] and paths[3].name in captured[0]
    assert all(finite for _, finite in results)


def test_identical_candidates_are_reported_or_refused(tmp_path: Path) -> None:
    paths = save(tmp_path, models.candidates()[:1] * 2)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            _, twa = cases.attach("plain", Run({}), paths)
        twa.close()
        assert any(paths[0].name in str(w.message) and paths[1].name in str(w.message) for w in caught)
    except TwaError as error:
        assert paths[0].name in str(error)
