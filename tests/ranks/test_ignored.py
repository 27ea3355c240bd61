"""Parameters that DDP ignores: their gradients are averaged before they are projected."""

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import twa_scale
from tests.pool import Pool


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(5, 4)
        self.scale = nn.Parameter(torch.ones(7, 4))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear(x)
        return y * self.scale.sum(0)


def coefficients(ddp: bool) -> Tensor:
    """Take one step on batches that differ by rank or, on one rank, on all of them."""
    net: nn.Module = Scaled()
    generator = torch.Generator().manual_seed(1)
    stored = [
        {k: v + 0.1 * torch.randn(v.shape, generator=generator) for k, v in net.state_dict().items()} for _ in range(3)
    ]
    batches = torch.randn(2, 8, 5, generator=generator)
    if ddp:
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(net, ["scale"])
        net = DistributedDataParallel(net)
        batches = batches[torch.distributed.get_rank()][None]
    twa = twa_scale.attach(net, stored, {"groups": "tensor", "optimizer": {"name": "sgd", "lr": 0.1}})
    for batch in batches:
        (net(batch).square().mean() / len(batches)).backward()
    twa.step()
    return twa.coefficients


def test_gradient_of_an_ignored_parameter_is_averaged(ranks: Pool) -> None:
    first, second = ranks(coefficients, 2, ddp=True)
    assert torch.equal(first, second)
    torch.testing.assert_close(first, coefficients(ddp=False), rtol=1e-5, atol=1e-6)
