"""`--format same` with checkpoints of DeepSpeed: training resumes from the average, with the state of the last one."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from tests import zero
from tests.pool import Pool
from twa_scale.merge import average_fixed


class Net(nn.Module):
    """A model with odd sizes, a frozen tensor, and statistics that a float32 model averages."""

    def __init__(self, with_statistics: bool) -> None:
        super().__init__()
        self.up = nn.Linear(5, 7)
        self.norm = nn.BatchNorm1d(7) if with_statistics else nn.LayerNorm(7)
        self.gain = nn.Parameter(torch.full((7,), 1.5), requires_grad=False)
        self.down = nn.Linear(7, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(torch.tanh(self.norm(self.up(x))) * self.gain)
        return y


def engine_of(kind: str, bf16: bool, seed: int) -> Any:
    torch.manual_seed(seed)
    net = Net(not bf16)
    trained = [p for p in net.parameters() if p.requires_grad]
    return zero.wrap(net, kind, bf16=bf16, optimizer=torch.optim.AdamW(trained, lr=0.1))


def step(engine: Any, number: int) -> None:
    generator = torch.Generator().manual_seed(10 * number + dist.get_rank())
    dtype = next(engine.module.parameters()).dtype
    engine.backward(engine(torch.randn(4, 5, generator=generator).to(dtype)).float().square().mean())
    engine.step()


def whole(engine: Any) -> dict[str, Tensor]:
    """Return the whole float32 weights."""
    from deepspeed.utils import safe_get_full_fp32_param

    named = {name: p for name, p in engine.module.named_parameters() if p.requires_grad}
    return {name: safe_get_full_fp32_param(p).clone() for name, p in named.items()}


def moments(engine: Any) -> list[Tensor]:
    """Return the moments of the partitions of this rank."""
    states = engine.optimizer.optimizer.state.values()
    return [value.clone() for state in states for value in state.values() if value.numel() > 1]


def resume(kind: str, bf16: bool, directory: Path) -> dict[str, Any]:
    """Train, average two checkpoints, and resume from the average with another engine."""
    engine = engine_of(kind, bf16, 0)
    paths = [directory / f"step-{number}" for number in (1, 2)]
    each = []
    for number, path in enumerate(paths, 1):
        step(engine, number)
        engine.save_checkpoint(str(path), client_state={"note": f"step {number}"})
        each.append({**whole(engine), **{name: b.clone() for name, b in engine.module.named_buffers()}})
    with warnings.catch_warnings(record=True) as messages:
        warnings.simplefilter("always")
        average_fixed([str(path) for path in paths], directory / "average", [0.25, 0.75], format="same")
    assert not [text for line in messages if "left out" in (text := str(line.message))]
    fresh = engine_of(kind, bf16, 1)
    _, client = fresh.load_checkpoint(str(directory / "average"))
    weights = whole(fresh)
    actual: dict[str, Any] = {
        "weights": weights,
        "buffers": {name: b.clone() for name, b in fresh.module.named_buffers()},
        "live": zero.whole(fresh),
        "each": each,
        "moments": (moments(fresh), moments(engine)),
        "counters": (fresh.global_steps, client["note"]),
    }
    step(fresh, 3)
    actual["moved"] = any(not torch.equal(value, weights[name]) for name, value in whole(fresh).items())
    return actual


@pytest.mark.parametrize(
    ("kind", "size", "bf16"), [("zero1", 2, True), ("zero2", 3, False), ("zero3", 2, False), ("zero3", 3, True)]
)
def test_training_resumes_from_the_average(ranks: Pool, kind: str, size: int, bf16: bool, tmp_path: Path) -> None:
    ended = ranks(resume, size, timeout=240, kind=kind, bf16=bf16, directory=tmp_path)
    first, second = ended[0]["each"]  # statistics of the other ranks are not in checkpoints
    for actual in ended:
        wanted = {name: 0.25 * first[name] + 0.75 * second[name] for name in first if first[name].is_floating_point()}
        assert not torch.equal(first["up.weight"], second["up.weight"])
        for name, value in actual["weights"].items():
            torch.testing.assert_close(value, wanted[name], rtol=0, atol=1e-6)
            assert torch.equal(actual["live"][name], value.to(actual["live"][name].dtype))
        for name, value in actual["buffers"].items():
            if value.is_floating_point():
                torch.testing.assert_close(value, wanted[name], rtol=0, atol=1e-6)
        resumed, last = actual["moments"]
        assert resumed and all(torch.equal(value, other) for value, other in zip(resumed, last, strict=True))
        assert actual["counters"] == (2, "step 2") and actual["moved"]
    for file in tmp_path.glob("average/global_step2/mp_rank_00_model_states.pt"):  # of ZeRO-1 and 2
        module = torch.load(file, weights_only=False)["module"]
        assert torch.equal(module["up.weight"], actual["weights"]["up.weight"].to(module["up.weight"].dtype))
    assert (tmp_path / "average/latest").read_text() == "global_step2"
