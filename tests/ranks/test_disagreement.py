"""Ranks with different candidates, settings or metrics have the same error on every rank, or a correct result."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import twa_scale
from tests import models
from tests.commands.small_runs import SCORES, run_here, settings
from tests.grid import rest_slow
from tests.pool import Pool
from tests.ranks import cases
from tests.ranks.cases import Run
from tests.ranks.test_reading import save
from twa_scale import CandidateError, ConfigError, Snapshots, TwaError
from twa_scale.merge import average_fixed
from twa_scale.ranks import Group
from twa_scale.run.batches import Batches
from twa_scale.run.evaluate import evaluate
from twa_scale.tools.inspection import inspect

ENGINES = ["plain", "ddp", "fsdp2"]
EACH_KIND = rest_slow([(engine,) for engine in ENGINES], lambda engine: engine != "ddp")


def states(count: int = 5) -> list[dict[str, Tensor]]:
    """Return more candidates than `models.candidates`, some of which differ only in the head."""
    made = models.candidates()
    while len(made) < count:
        made.append({name: value.clone() for name, value in made[-1].items()})
        made[-1]["head.weight"] = made[-1]["embed.weight"] = made[-1]["embed.weight"] + 0.01
    return made


def attach(engine: str, given: Sequence[Any], configs: Sequence[dict[str, Any]] = ({},) * 3) -> dict[str, Tensor]:
    rank, _ = cases.where()
    model, twa = cases.attach(engine, Run(configs[rank]), given[rank])
    result = cases.gathered(model)
    twa.close()
    return result


@pytest.mark.parametrize(
    ("engine", "size", "case"),
    rest_slow(
        product(ENGINES, [2, 3], ["shifted", "more", "head only"]),
        lambda engine, size, case: size == (2 if case == "more" else 3) and (engine == "fsdp2" or case == "shifted"),
    ),
)
def test_different_paths_are_refused(ranks: Pool, tmp_path: Path, engine: str, size: int, case: str) -> None:
    paths = save(tmp_path, states(6))
    first, last = {
        "shifted": (paths[0:4], paths[1:5]),
        "more": (paths[:4], paths[:5]),
        "head only": (paths[:4], [*paths[:3], paths[5]]),
    }[case]
    error = ranks.error(attach, size, engine=engine, given=[first] * (size - 1) + [last])
    assert isinstance(error, CandidateError) and f"rank {size - 1}" in str(error) and "rank 0" in str(error)


@pytest.mark.parametrize("engine", EACH_KIND)
def test_different_state_dicts_are_refused(ranks: Pool, engine: str) -> None:
    changed = models.candidates()
    changed[2]["blocks.1.up.bias"][-1] += 1e-3
    inputs = [models.candidates(), models.candidates(), changed]
    error = ranks.error(attach, 3, engine=engine, given=inputs)
    assert isinstance(error, CandidateError) and "blocks.1.up.bias" in str(error) and "state dict 2" in str(error)
    inputs = [models.candidates(), models.candidates()[:3]]
    assert "3 candidates" in str(ranks.error(attach, 2, engine=engine, given=inputs))


@pytest.mark.parametrize("engine", EACH_KIND)
def test_copies_on_local_disks(ranks: Pool, tmp_path: Path, engine: str) -> None:
    """Equal copies may have any name. The error for a different one names rank, candidate and tensor."""
    inputs = []
    for rank in range(3):
        (tmp_path / f"disk-{rank}").mkdir()
        save(tmp_path / f"disk-{rank}", models.candidates())
        inputs.append(str(tmp_path / f"disk-{rank}" / "step-*.safetensors"))
    results = ranks(attach, 3, engine=engine, given=inputs)
    assert all(torch.equal(result[name], value) for result in results for name, value in results[0].items())
    spoiled = tmp_path / "disk-1" / "step-20.safetensors"
    tensors = load_file(spoiled)
    tensors["blocks.0.qkv.weight"] *= 1.001
    save_file(tensors, spoiled)
    error = ranks.error(attach, 3, engine=engine, given=inputs)
    assert isinstance(error, CandidateError) and str(spoiled) in str(error) and "blocks.0.qkv.weight" in str(error)


def attach_to_what_the_first_sees(pattern: str, late: Path) -> list[str]:
    """Add a candidate after the first rank has resolved the glob."""
    rank, _ = cases.where()
    group = Group.world()
    broadcast = Group.broadcast

    def appear(self: Group, value: Any, source: int = 0) -> Any:
        value = broadcast(self, value, source)
        if rank == 0 and isinstance(value, list) and isinstance(value[0], Path):
            save_file(load_file(late.with_name("step-10.safetensors")), late)
        return value

    with patch.object(Group, "broadcast", appear):
        _, twa = cases.attach("fsdp2", Run({}), pattern)
    assert group.size == 2
    return list(twa.fingerprint.labels)


def test_one_rank_resolves_a_glob_for_all(ranks: Pool, tmp_path: Path) -> None:
    paths = save(tmp_path, models.candidates())
    pattern = str(tmp_path / "step-*.safetensors")
    late = tmp_path / "step-90.safetensors"
    results = ranks(attach_to_what_the_first_sees, 2, pattern=pattern, late=late)
    assert late.exists() and results == [[str(path) for path in paths]] * 2


@pytest.mark.parametrize("engine", EACH_KIND)
@pytest.mark.parametrize(
    ("key", "values"), [("groups", ("block", "tensor")), ("optimizer", ({"lr": 0.1}, {"lr": 0.2}))]
)
def test_different_settings_are_refused(
    ranks: Pool, tmp_path: Path, engine: str, key: str, values: tuple[Any, Any]
) -> None:
    paths = save(tmp_path, models.candidates())
    configs = [{key: values[0]}, {key: values[0]}, {key: values[1]}]
    error = ranks.error(attach, 3, engine=engine, given=[paths] * 3, configs=configs)
    assert isinstance(error, ConfigError) and key in str(error) and "rank 2" in str(error) and "rank 0" in str(error)


def errors_of_other_steps(engine: str) -> tuple[dict[str, str], bool]:
    """Return the errors about settings that only the last rank has; and whether its coefficients are still equal."""
    rank, size = cases.where()
    last = rank == size - 1
    errors: dict[str, str] = {}

    def step(scaler: torch.amp.GradScaler | None = None) -> None:
        loss = models.loss(model, models.batch(rank))
        (loss if scaler is None else scaler.scale(loss)).backward()
        twa.step(scaler)

    model, twa = cases.attach(engine, Run({"optimizer": {"name": "sgd", "lr": 0.1}}))
    twa.set_lr(0.2 if last else 0.1)
    errors["lr"] = cases.error_text(step)
    twa.set_lr(0.1)
    errors["scale"] = cases.error_text(lambda: step(torch.amp.GradScaler("cpu", init_scale=1024.0 if last else 512.0)))
    errors["start"] = cases.error_text(lambda: twa.start_from("last" if last else "first"))
    step()
    step()
    equal = torch.equal(twa.coefficients, twa.pods.broadcast(twa.coefficients))
    twa.optimizer.param_groups[0]["lr"] = 0.1 * (1 + last)
    step()  # the third step is not compared
    errors["coefficients"] = cases.error_text(lambda: twa.export("never written"))
    twa.set_lr(0.1)
    errors["coefficients alone"] = cases.error_text(lambda: twa.export("never written"))
    twa.close()
    return errors, equal


@pytest.mark.parametrize("engine", ["plain", "fsdp2"])
def test_different_steps_are_refused(ranks: Pool, engine: str) -> None:
    (errors, equal), other = ranks(errors_of_other_steps, 2, engine=engine)
    assert (errors, equal) == other and equal
    for name, word in {"lr": "lr of the optimizer", "scale": "scale of the loss", "start": "start_from"}.items():
        assert word in errors[name] and "rank 1" in errors[name], errors
    assert "lr of the optimizer" in errors["coefficients"] and "coefficients of" in errors["coefficients alone"]


def errors_of_other_models() -> list[str]:
    last = cases.where()[0] == 1
    frozen, narrow, reordered = models.build(), models.build(), models.build()
    frozen.head.weight.requires_grad_(not last)
    if last:
        narrow.bfloat16()
        reordered._modules["stem"] = reordered._modules.pop("stem")
    return [
        cases.error_text(lambda model=model: twa_scale.attach(model, models.candidates()))  # type: ignore[misc]
        for model in (frozen, narrow, reordered)
    ]


def test_different_models_are_refused(ranks: Pool) -> None:
    errors, other = ranks(errors_of_other_models, 2)
    assert errors == other
    for error, word in zip(errors, ["requires no gradient", "bfloat16", "'embed.weight'"], strict=True):
        assert error.startswith("parameter ") and word in error and "rank 1" in error, error


# Averages without a model


def average(given: Sequence[Any], out: Path) -> None:
    words, options = given[cases.where()[0]]
    average_fixed(list(map(str, words)), options.pop("out", out), **options)


@pytest.mark.parametrize(
    ("first", "words"),
    [
        ({"weights": "linear"}, ["--weights", "linear"]),
        ({"dtype": "bfloat16"}, ["bfloat16", "float32"]),
        ({"max_shard_size": "1MB"}, ["max_shard_size", "1MB"]),
        ({"out": "elsewhere"}, ["output", "elsewhere"]),
        ({"overwrite": True}, ["overwrite"]),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_average_with_different_options(ranks: Pool, tmp_path: Path, first: dict[str, Any], words: list[str]) -> None:
    paths = save(tmp_path, models.candidates())
    error = ranks.error(average, 2, given=[(paths, {}), (paths, first)], out=tmp_path / "out")
    assert isinstance(error, ConfigError) and all(word in str(error) for word in words), str(error)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("size", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_average_of_different_candidates(ranks: Pool, tmp_path: Path, size: int) -> None:
    paths = save(tmp_path, states())
    inputs: list[tuple[list[Path], dict[str, Any]]] = [(paths[:4], {})] * (size - 1)
    error = ranks.error(average, size, given=[*inputs, (paths[1:5], {})], out=tmp_path / "out")
    assert isinstance(error, CandidateError)
    weighed = [[f"{path}:{weight}" for path in paths[:2]] for weight in ("0.5", "0.25")]
    error = ranks.error(average, 2, given=[(words, {}) for words in weighed], out=tmp_path / "out")
    assert isinstance(error, ConfigError) and "PATH:WEIGHT" in str(error)


def look(given: Sequence[list[Path]]) -> tuple[Tensor, list[float]]:
    actual = inspect(given[cases.where()[0]])
    return torch.from_numpy(actual.cosines), actual.norms


def test_inspect_is_shared_by_the_ranks(ranks: Pool, tmp_path: Path) -> None:
    paths = save(tmp_path, states())
    (single,) = ranks(look, 1, given=[paths])
    for actual in ranks(look, 3, given=[paths] * 3):
        torch.testing.assert_close(actual[0], single[0], rtol=1e-9, atol=1e-9)
        assert actual[1] == pytest.approx(single[1], rel=1e-12)
    assert isinstance(ranks.error(look, 2, given=[paths[:4], paths[1:]]), CandidateError)


# Metrics


@dataclass
class MetricsByRank:
    """A task that returns the given metrics for each rank and batch."""

    by_rank: list[list[dict[str, Any]]]

    def __post_init__(self) -> None:
        self._batches = iter(self.by_rank[dist.get_rank()])

    def metrics(self, model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Any]:
        return next(self._batches)


class NoBatches(Batches):
    """Batches that are empty on all ranks except for the first."""

    def in_order(self, limit: int | None = None, every: int = 1) -> Any:
        return super().in_order(0 if self.rank else limit, every)


class Numbers(list[dict[str, Tensor]]):
    """Examples."""


def measure(by_rank: list[list[dict[str, Any]]], kind: type[Batches] = Batches) -> dict[str, float]:
    rank, size = cases.where()
    examples = Numbers([{"x": torch.zeros(1)}] * size * len(by_rank[0]))
    batches = kind(examples, size, 1, rank, size, 0)
    return evaluate(MetricsByRank(by_rank), nn.Linear(1, 1), batches, Group.world(), torch.device("cpu"))  # type: ignore[arg-type]


def metrics(**values: tuple[float, int]) -> dict[str, Any]:
    return {name: (torch.tensor(total), count) for name, (total, count) in values.items()}


def test_metrics_in_another_order(ranks: Pool) -> None:
    first, second = metrics(loss=(1.0, 1), accuracy=(0.5, 1)), metrics(accuracy=(0.5, 1), loss=(1.0, 1))
    assert ranks(measure, 2, by_rank=[[first], [second]]) == [{"loss": 1.0, "accuracy": 0.5}] * 2


def test_metrics_of_some_ranks_only(ranks: Pool) -> None:
    """Each metric is the mean over the batches that have it, on any rank."""
    by_rank = [
        [metrics(loss=(1.0, 2)), metrics(loss=(1.0, 2))],
        [metrics(rare=(3.0, 1), loss=(2.0, 4)), metrics(loss=(0.0, 2))],
        [metrics(loss=(1.0, 2)), metrics(loss=(1.0, 4), rare=(1.0, 3))],
    ]
    assert ranks(measure, 3, by_rank=by_rank) == [{"loss": 6 / 16, "rare": 1.0}] * 3


def test_rank_without_batches(ranks: Pool) -> None:
    by_rank = [[metrics(loss=(1.0, 4), other=(2.0, 1))], [{}]]
    assert ranks(measure, 2, by_rank=by_rank, kind=NoBatches) == [{"loss": 0.25, "other": 2.0}] * 2


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (metrics(loss=(1.0, 1), tokens=(0.0, 0)), ["tokens", "evaluate_batches"]),
        ({"loss": torch.tensor(1.0), "tokens": (1.0, 1)}, ["loss", "count"]),
        ({"loss": (torch.ones(2), 1)}, ["loss", "scalar"]),
        ({"loss": ("much", 1)}, ["loss", "much"]),
    ],
    ids=["nothing counted", "no pair", "no scalar", "no number"],
)
def test_metrics_that_cannot_be_averaged(ranks: Pool, wrong: dict[str, Any], words: list[str]) -> None:
    """An invalid metric of one rank is named on both, after all forward passes."""
    valid = metrics(loss=(1.0, 1))
    error = ranks.error(measure, 2, by_rank=[[valid, valid], [wrong, valid]])
    assert isinstance(error, TwaError) and all(word in str(error) for word in words), str(error)


# Runs and snapshots


def begin_run(data: Sequence[dict[str, Any]]) -> None:
    run_here(data[cases.where()[0]])


@pytest.mark.parametrize(("key", "value"), [("steps", 5), ("evaluate_every", 2), ("output", "elsewhere")])
def test_run_with_different_settings(ranks: Pool, tmp_path: Path, key: str, value: Any) -> None:
    """The error comes before anything is read: the candidates do not exist."""
    first = settings("nowhere/*", SCORES, tmp_path / "out")
    error = ranks.error(begin_run, 2, data=[first, first | {key: value}])
    assert isinstance(error, ConfigError) and str(error).startswith(f"{key}: rank 1 has {value!r}")
    assert not (tmp_path / "out").exists()


def snapshot(directories: Sequence[Path], steps: Sequence[int], options: Sequence[dict[str, Any]]) -> None:
    rank, _ = cases.where()
    snapshots = Snapshots(directories[rank], every_n_steps=1, **options[rank])
    snapshots.step(models.wrap(models.build(), "fsdp2"), steps[rank])


@pytest.mark.parametrize(
    ("value", "word"),
    [
        ({"directories": ["a", "b"]}, "output"),
        ({"steps": [1, 2]}, "step"),
        ({"options": [{}, {"asynchronous": True}]}, "asynchronous"),
    ],
    ids=["directory", "step", "asynchronous"],
)
def test_snapshots_of_ranks_that_differ(ranks: Pool, tmp_path: Path, value: dict[str, Any], word: str) -> None:
    usual: dict[str, Any] = {"directories": ["a", "a"], "steps": [1, 1], "options": [{}, {}]} | value
    usual["directories"] = [tmp_path / name for name in usual["directories"]]
    error = ranks.error(snapshot, 2, **usual)
    assert isinstance(error, ConfigError) and str(error).startswith(word)
    assert not list(tmp_path.iterdir())
