"""Average bfloat16 candidates in a bfloat16 model, and compare the export with a merge in float64."""

from collections.abc import Iterator

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F

import twa_scale
from tests.gpu.stages.alone import alone
from tests.gpu.stages.setup import Row, Setup
from tests.gpu.stages.sharded import build, candidates

STEPS = 5
ONE_ROUNDING = 2.0**-8 * 1.01
"""Half a unit in the last place of bfloat16, and the rounding errors of float32."""


def run(setup: Setup) -> Iterator[Row]:
    states = [{name: value.bfloat16() for name, value in state.items()} for state in candidates()]
    with alone(setup):
        for kind in ("plain", "FSDP2"):
            model = build().to(setup.device, torch.bfloat16)
            if kind == "FSDP2":
                mesh = init_device_mesh(setup.device.type, (1,))
                fully_shard(model[2], mesh=mesh)
                fully_shard(model, mesh=mesh)
            twa = twa_scale.attach(model, states, {"groups": "tensor", "optimizer": {"lr": 0.1}})
            generator = torch.Generator().manual_seed(2)
            for _ in range(STEPS):
                x, y = torch.randn(16, 32, generator=generator), torch.randn(16, 1, generator=generator)
                out = model(x.to(setup.device, torch.bfloat16))
                F.mse_loss(out.float(), y.to(setup.device)).backward()
                twa.step()
                twa.zero_grad()
            a, group_of = twa.coefficients.cpu(), twa.layout.group_of
            twa.export(setup.scratch / kind)
            twa.close()
            written = load_file(setup.scratch / kind / "model.safetensors")
            worst = max(
                error(value, a[:, group_of[name]], torch.stack([state[name] for state in states]))
                for name, value in written.items()
            )
            label = f"{kind}, error of an exported element"
            yield Row(label, f"{worst:.1e}", f"{ONE_ROUNDING:.1e}", worst <= ONE_ROUNDING)


def error(value: Tensor, a: Tensor, candidates: Tensor) -> float:
    """Return the largest error of an element of sum_i a_i w_i, relative to the sum of the magnitudes of its terms."""
    assert value.dtype == torch.bfloat16
    terms = torch.einsum("i,i...->i...", a, candidates.double())
    return float(((value.double() - terms.sum(0)).abs() / terms.abs().sum(0).clamp(min=1e-30)).max())
