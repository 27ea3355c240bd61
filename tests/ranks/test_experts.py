"""One coefficient for each expert, in separate modules or stacked in one tensor that ranks divide anywhere."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import twa_scale
from tests import flattened, reference, zero
from tests.grid import rest_slow
from tests.pool import Pool
from tests.ranks import cases
from tests.ranks.test_running import put
from twa_scale.engines.zero import is_deepspeed

WIDTH, INNER, EXPERTS, STEPS, BATCH = 3, 5, 4, 3, 12
SGD = {"name": "sgd", "lr": 0.05, "momentum": 0.9}


class Stacked(nn.Module):
    """All experts, stacked in one tensor for up, its bias, and down."""

    def __init__(self) -> None:
        super().__init__()
        self.num_experts = EXPERTS
        self.up = nn.Parameter(torch.randn(EXPERTS, INNER, WIDTH))
        self.bias = nn.Parameter(torch.randn(EXPERTS, INNER))
        self.down = nn.Parameter(torch.randn(EXPERTS, WIDTH, INNER))

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        inner = torch.tanh(torch.einsum("bw,eiw->bei", x, self.up) + self.bias)
        return torch.einsum("be,bei,ewi->bw", gate, inner, self.down)


class Expert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(INNER, WIDTH))
        self.bias = nn.Parameter(torch.randn(INNER))
        self.down = nn.Parameter(torch.randn(WIDTH, INNER))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x @ self.up.T + self.bias) @ self.down.T


class SeparateExperts(nn.ModuleList):
    """One module for each expert."""

    def __init__(self) -> None:
        super().__init__(Expert() for _ in range(EXPERTS))

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        return sum((gate[:, i, None] * expert(x) for i, expert in enumerate(self)), torch.zeros_like(x))


class Layer(nn.Module):
    def __init__(self, stacked: bool) -> None:
        super().__init__()
        self.router = nn.Linear(WIDTH, EXPERTS)
        self.experts = Stacked() if stacked else SeparateExperts()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.experts(x, self.router(x).softmax(-1))
        return x + y


class Mixture(nn.Module):
    """The experts of the first layer are stacked or not; those of the second layer never are."""

    def __init__(self, stacked: bool = True) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Layer(stacked and i == 0) for i in range(2))
        self.head = nn.Linear(WIDTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        y: Tensor = self.head(x)
        return y


def states() -> list[dict[str, Tensor]]:
    torch.manual_seed(0)
    base = Mixture().state_dict()
    return [{name: value + 0.1 * torch.randn_like(value) for name, value in base.items()} for _ in range(3)]


def with_separate_experts(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the same values, with the experts of the first layer in separate modules."""
    actual: dict[str, Tensor] = {}
    for name, value in state.items():
        path, _, last = name.rpartition(".")
        split = path == "blocks.0.experts"
        actual |= {f"{path}.{i}.{last}": part for i, part in enumerate(value)} if split else {name: value}
    return actual


def batch(step: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return {key: torch.randn(BATCH, size, generator=generator) for key, size in (("x", WIDTH), ("y", 1))}


def loss(model: nn.Module, data: dict[str, Tensor]) -> Tensor:
    dtype = next(model.parameters()).dtype
    y: Tensor = model(data["x"].to(dtype))
    return (y - data["y"].to(dtype)).square().mean()


def held_by(engine: str) -> nn.Module:
    model = Mixture()
    if engine == "plain":
        return model
    if engine == "ddp":
        return DistributedDataParallel(model)
    if engine in zero.ENGINES:
        stored: nn.Module = zero.wrap(model, engine)
        return stored
    if engine in flattened.ENGINES:
        return flattened.wrap(model, engine)
    for block in model.blocks:
        fully_shard(block)
    fully_shard(model)
    return model


def train(engine: str, config: dict[str, Any], paths: list[Path]) -> tuple[dict[str, Tensor], Tensor, list[str], int]:
    """Return the weights, the coefficients, the groups and the bytes that this rank has read."""
    model = held_by(engine)
    with pytest.warns(UserWarning, match="groups: expert: 8 experts") if cases.where()[0] == 0 else nullcontext():
        twa = twa_scale.attach(model, paths, config)
    rank, size = cases.where()
    for step in range(STEPS):
        data = {key: value.tensor_split(size)[rank] for key, value in batch(step).items()}
        if engine in zero.ENGINES:
            model.backward(loss(model, data))  # type: ignore[operator]
        else:
            loss(model, data).backward()
        twa.step()
        twa.zero_grad()
    twa.write_deferred()
    result = cases.gathered(model), twa.coefficients.clone(), list(twa.layout.groups), twa.bytes_read
    with twa.weights("last"):
        last = states()[-1]
        for name, value in cases.gathered(model).items():
            torch.testing.assert_close(value, last[name], rtol=0, atol=1e-2 if "store" in config else 1e-5)
    twa.close()
    return result


@pytest.mark.parametrize(
    ("engine", "size", "config"),
    rest_slow(
        [
            ("plain", 1, {"basis": "orthonormal"}),
            ("ddp", 2, {"store": "packed8"}),
            ("fsdp1-flat", 3, {}),
            ("fsdp1", 2, {"basis": "simplex"}),
            ("fsdp2", 3, {"combine": "forward"}),
            ("fsdp2", 2, {"basis": "pca", "max_grad_norm": 0.1}),
            ("zero3", 2, {}),
            ("zero2", 3, {}),
        ],
        lambda engine, *_: engine not in ("ddp", "fsdp1", "zero2"),
    ),
)
def test_experts_are_trained_as_those_of_the_reference(
    ranks: Pool, engine: str, size: int, config: dict[str, Any], tmp_path: Path
) -> None:
    paths = [tmp_path / f"step-{i}.safetensors" for i in range(3)]
    for path, state in zip(paths, states(), strict=True):
        save_file(state, path)
    config = {"optimizer": SGD, **config}
    experts = [rf"blocks\.{layer}\.experts\.{i}\." for layer in range(2) for i in range(EXPERTS)]
    wanted = reference.train(
        Mixture(stacked=False),
        loss,
        [with_separate_experts(state) for state in states()],
        {**config, "groups": [*experts, "blocks.0", "blocks.1", "head"]},
        [
            [{key: value.tensor_split(size)[rank] for key, value in batch(s).items()} for rank in range(size)]
            for s in range(STEPS)
        ],
    )
    ended = ranks(train, size, engine=engine, config={**config, "groups": "expert"}, paths=paths)
    tolerance = 1e-2 if "store" in config else 1e-5
    for weights, a, groups, _ in ended:
        actual = with_separate_experts(weights)
        for name, value in wanted.weights[-1].items():
            assert (actual[name].double() - value).norm() <= tolerance * value.norm(), name
        assert torch.equal(a, ended[0][1])
        names = {re_name(group): column for column, group in enumerate(groups)}
        for column, group in enumerate(wanted.groups):
            unique = wanted.coefficients[-1][:, column]
            if not unique.isnan().any():
                torch.testing.assert_close(a[:, names[re_name(group)]], unique, rtol=10 * tolerance, atol=tolerance)
    read, stored = sum(read for *_, read in ended), 3 * sum(value.nbytes for value in states()[0].values())
    assert read == (size if engine == "plain" else 1) * stored


def learn(engine: str, store: str, basis: str, directory: Path) -> tuple[dict[str, Tensor], dict[str, Tensor], bool]:
    """Train the coefficients of a window in memory, and of the files with its snapshots.

    Returns:
        The weights and coefficients `a` of both, and whether `restore` has given the trained weights back.
    """
    model = held_by(engine)
    averages = twa_scale.RunningAverages(model, window={"every": 1, "keep": 3, "store": store})
    for state in states():
        put(model, state)
        averages.step()
    before = cases.gathered(model)
    config = {"groups": "expert", "basis": basis, "center": "ema:0.5", "exclude": ["blocks.1.router"], "optimizer": SGD}
    from_memory = trained(model, averages.learn(config))
    averages.restore()
    restored = cases.gathered(model)
    files = averages.save(directory)
    from_files = trained(model, twa_scale.attach(model, files, config))
    return from_memory, from_files, all(torch.equal(restored[name], value) for name, value in before.items())


def trained(model: nn.Module, twa: twa_scale.TrainableAverage) -> dict[str, Tensor]:
    assert "blocks.0.experts.3" in twa.layout.groups
    for step in range(STEPS):
        value = loss(model, batch(step))
        if is_deepspeed(model):
            model.backward(value)
        else:
            value.backward()
        twa.step()
        twa.zero_grad()
    actual = {"a": twa.coefficients.clone(), **cases.gathered(model)}
    twa.close()
    return actual


@pytest.mark.filterwarnings("ignore:groups. expert:UserWarning")
@pytest.mark.parametrize(
    ("engine", "size", "store", "basis"),
    [
        ("plain", 1, "packed1", "orthonormal"),
        ("fsdp2", 3, "dense32", "pca"),
        ("fsdp1-flat", 3, "packed8", "simplex"),
        ("zero3", 2, "dense16", "normalized"),
    ],
)
def test_experts_are_learned_from_a_window_as_from_its_files(
    ranks: Pool, engine: str, size: int, store: str, basis: str, tmp_path: Path
) -> None:
    ended = ranks(learn, size, engine=engine, store=store, basis=basis, directory=tmp_path)
    for from_memory, from_files, restored in ended:
        assert restored and not torch.equal(from_files["a"][:, 0], from_files["a"][:, 3])
        for name, value in from_files.items():
            torch.testing.assert_close(from_memory[name], value, rtol=1e-3, atol=1e-5)


def re_name(group: str) -> str:
    return group.replace("\\", "").rstrip(".")
