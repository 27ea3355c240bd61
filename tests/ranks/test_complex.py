"""Complex tensors are averaged as pairs of real numbers: by `average`, and by `attach` on every engine and store."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import twa_scale
from tests.pool import Pool
from tests.sums import weighted
from twa_scale import CandidateError, OutputError, Snapshots
from twa_scale.merge import average_fixed

N = 3


class Wave(nn.Module):
    """A complex filter, as FNO and S4 layers have, with a complex buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.filter = nn.Parameter(torch.randn(5, 3, dtype=torch.complex64))
        self.gain = nn.Parameter(torch.randn((), dtype=torch.complex64))
        self.fixed = nn.Parameter(torch.randn(3, dtype=torch.complex64), requires_grad=False)
        self.register_buffer("phase", torch.randn(4, dtype=torch.complex64))

    def forward(self, x: Tensor) -> Tensor:
        return (self.filter @ (x.to(torch.complex64) * self.gain + self.fixed).T).abs().T.clone()


class Filter(nn.Module):
    """Complex and real layers."""

    def __init__(self) -> None:
        super().__init__()
        self.wave = Wave()
        self.real = nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.real(self.wave(x))
        return y


def states(n: int = N) -> list[dict[str, Tensor]]:
    actual = []
    for seed in range(n):
        torch.manual_seed(seed)
        actual.append({name: value.clone() for name, value in Filter().state_dict().items()})
    return actual


def averaged(candidates: list[dict[str, Tensor]], weights: list[float]) -> dict[str, Tensor]:
    actual = {
        name: weighted(weights, (state[name].to(torch.complex128) for state in candidates)) for name in candidates[0]
    }
    return actual | {"wave.phase": candidates[-1]["wave.phase"]}


def require_close(found: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float = 1e-6) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name].to(torch.complex128), value.to(torch.complex128), rtol=0, atol=tolerance)


def save(folder: Path) -> list[str]:
    paths = [str(folder / f"{i}.safetensors") for i in range(N)]
    for path, state in zip(paths, states(), strict=True):
        save_file(state, path)
    return paths


@pytest.mark.filterwarnings("ignore:copied, not averaged")
def test_average_and_attach_give_the_same_bits(tmp_path: Path) -> None:
    paths, weights = (
        save(
            tmp_path,
        ),
        [0.2, 0.7, 0.1],
    )
    average_fixed(paths, tmp_path / "merged", weights, max_shard_size=100)
    merged: dict[str, Tensor] = {}
    for file in (tmp_path / "merged").glob("*.safetensors"):
        merged |= load_file(file)
    assert {name: (v.dtype, v.shape) for name, v in merged.items()} == {
        name: (v.dtype, v.shape) for name, v in states()[0].items()
    }
    wanted = averaged(states(), weights)
    wanted["wave.phase"] = weighted(weights, (state["wave.phase"] for state in states()))  # no buffer by name
    require_close(merged, wanted)
    model = Filter()
    twa = twa_scale.attach(model, paths, {"center": weights})
    twa.export(tmp_path / "live")
    live = load_file(tmp_path / "live/model.safetensors")
    assert all(torch.equal(live[name], merged[name]) for name in merged if name != "wave.phase")
    assert torch.equal(live["wave.phase"], states()[-1]["wave.phase"])


def train(engine: str, store: str, combine: str = "step") -> dict[str, Tensor]:
    """Make two SGD steps on the coefficients. Every rank sees the same data."""
    torch.manual_seed(9)
    inner = Filter()
    model: nn.Module = inner
    if engine == "ddp":
        model = DistributedDataParallel(model)
    elif engine == "fsdp2":
        scalar = {inner.wave.gain}  # which has no dimension to shard
        fully_shard(inner.wave, ignored_params=scalar)  # units have one type
        fully_shard(model, ignored_params=scalar)
    config = {"groups": "tensor", "store": store, "optimizer": {"name": "sgd", "lr": 0.05}, "combine": combine}
    twa = twa_scale.attach(model, states(), config)
    for seed in range(2):
        x = torch.randn(8, 3, generator=torch.Generator().manual_seed(seed))
        model(x).square().mean().backward()
        twa.step()
    twa.write_deferred()
    actual = {n: v.full_tensor() if isinstance(v, DTensor) else v for n, v in inner.state_dict().items()}
    return {"coefficients": twa.coefficients, **{name: value.clone() for name, value in actual.items()}}


def by_autograd() -> dict[str, Tensor]:
    """Make the same steps with whole candidates in double precision."""
    stored = states()
    names = [name for name, p in Filter().named_parameters() if p.requires_grad]
    stacked = {name: torch.stack([s[name].to(torch.complex128) for s in stored]) for name in names}
    mean = {name: values.mean(0) for name, values in stacked.items()}
    deltas = {name: values - mean[name] for name, values in stacked.items()}
    norms = {n: d.reshape(N, -1).abs().square().sum(1).sqrt() for n, d in deltas.items()}
    x = {n: torch.zeros(N, dtype=torch.float64, requires_grad=True) for n in names}
    rest = averaged(stored, [1 / N] * N)

    def weights() -> dict[str, Tensor]:
        actual = {}
        for n in names:
            u = (x[n] * norms[n].mean() / norms[n]).to(torch.complex128)
            value = mean[n] + torch.tensordot(u, deltas[n], dims=1)
            actual[n] = value if stored[0][n].is_complex() else value.real
        return actual

    for seed in range(2):
        data = torch.randn(8, 3, generator=torch.Generator().manual_seed(seed)).double()
        w = weights()
        hidden = (w["wave.filter"] @ (data.to(torch.complex128) * w["wave.gain"] + rest["wave.fixed"]).T).abs().T
        loss = (hidden @ w["real.weight"].T + w["real.bias"]).square().mean()
        gradients = torch.autograd.grad(loss, [x[n] for n in names])
        with torch.no_grad():
            for n, gradient in zip(names, gradients, strict=True):
                x[n] -= 0.05 * gradient
    return {n: value.detach() for n, value in weights().items()} | {n: rest[n] for n in ("wave.fixed", "wave.phase")}


@pytest.mark.filterwarnings("ignore:copied, not averaged")
@pytest.mark.parametrize(
    ("store", "tolerance"), [("dense32", 1e-5), ("dense16", 2e-2), ("packed8", 2e-2), ("mapped", 1e-5)]
)
def test_stores(store: str, tolerance: float) -> None:
    actual = train("plain", store)
    del actual["coefficients"]
    require_close(actual, by_autograd(), tolerance)


@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_engines(ranks: Pool, engine: str) -> None:
    for actual in ranks(train, 2, engine=engine, store="dense32"):
        del actual["coefficients"]
        require_close(actual, by_autograd(), 1e-5)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_snapshots(tmp_path: Path, asynchronous: bool) -> None:
    model = Filter()
    with Snapshots(tmp_path, every_n_steps=1, dtype=torch.bfloat16, asynchronous=asynchronous) as snapshots:
        path = snapshots.save(model, 1)
    actual = load_file(path / "model.safetensors")
    for name, value in model.state_dict().items():
        assert torch.equal(actual[name], value if value.is_complex() else value.bfloat16())


def test_complex128_needs_a_supported_dtype(tmp_path: Path) -> None:
    stored = [{"w": torch.randn(3, dtype=torch.complex128), "v": torch.randn(2)} for _ in range(2)]
    paths = [str(tmp_path / f"{i}.pt") for i in range(2)]
    for path, state in zip(paths, stored, strict=True):
        torch.save(state, path)
    with pytest.raises(OutputError, match=r"'w'.*complex128; choose dtype float32"):
        average_fixed(paths, tmp_path / "out")
    average_fixed(paths, tmp_path / "out", dtype="float32")
    actual = load_file(tmp_path / "out/model.safetensors")
    torch.testing.assert_close(
        actual["w"].to(torch.complex128), (stored[0]["w"] + stored[1]["w"]) / 2, rtol=0, atol=1e-7
    )


@pytest.mark.parametrize(
    ("stored", "own", "message"),
    [
        (torch.complex64, torch.float32, "'w' is complex, the model's is floating point"),
        (torch.int8, torch.float32, "'w' is integer, the model's is floating point"),
        (torch.float32, torch.complex64, "'w' is floating point, the model's is complex"),
        (torch.float32, torch.int64, "'w' is floating point, the model's is integer"),
    ],
    ids=str,
)
def test_real_and_complex_tensors_are_not_mixed(stored: torch.dtype, own: torch.dtype, message: str) -> None:
    model: Any = nn.Linear(2, 2)
    model.w = nn.Parameter(torch.ones(3, *([2] if stored.is_complex else []), dtype=own), requires_grad=False)
    shape = (3, 2) if own.is_complex else (3,)
    candidates = [{**nn.Linear(2, 2).state_dict(), "w": torch.ones(shape, dtype=stored)} for _ in range(2)]
    with pytest.raises(CandidateError, match=message):
        twa_scale.attach(model, candidates)


@pytest.mark.parametrize("value", [complex("nan"), complex(0, float("inf"))])
def test_nonfinite_values_are_located(tmp_path: Path, value: complex) -> None:
    stored = states()
    stored[1]["wave.filter"][4, 2] = torch.tensor(value)
    with pytest.raises(CandidateError, match=r"state dict 1.*'wave.filter'.* element 2[89]"):
        twa_scale.attach(Filter(), stored)
