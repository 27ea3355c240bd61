"""FSDP1 and fairscale's FullyShardedDataParallel on one GPU, or on two. The latter does not run on CPUs."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecision

import twa_scale
from tests.gpu.test_cuda import build, candidates, check, exact, nccl, train
from tests.pool import Pool

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]
two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two GPUs")
KINDS = ["fsdp1", "fsdp1-flat", "fairscale", "fairscale-single"]
__all__ = ["exact", "nccl"]  # fixtures


def shard(kind: str, group: dist.ProcessGroup | None, *, bf16: bool = False) -> nn.Module:
    wrapper: Any = FullyShardedDataParallel
    options: dict[str, Any] = {"process_group": group}
    if kind.startswith("fairscale"):
        from fairscale.nn import data_parallel

        wrapper = data_parallel.FullyShardedDataParallel
        options["process_group_reduce_scatter"] = group  # fairscale would keep groups from one test to the next
        options["flatten_parameters"] = kind == "fairscale"
        if bf16:
            options |= {"mixed_precision": True, "compute_dtype": torch.bfloat16, "fp32_reduce_scatter": True}
    else:
        options["use_orig_params"] = kind == "fsdp1"
        if bf16:
            options["mixed_precision"] = MixedPrecision(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    model = build().cuda()
    model[2] = wrapper(model[2], **options)
    stored: nn.Module = wrapper(model, **options)
    return stored


@pytest.mark.parametrize("kind", KINDS)
def test_one_rank(nccl: None, kind: str) -> None:
    check(train(shard(kind, dist.group.WORLD), "cuda"), 1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_one_rank_in_bfloat16(nccl: None, kind: str) -> None:
    """The trained weights are the float32 shards."""
    check(train(shard(kind, dist.group.WORLD, bf16=True), "cuda"), 3e-2)


def trained(kind: str, bf16: bool) -> tuple[dict[str, Tensor], Tensor]:
    torch.cuda.set_device(dist.get_rank())
    return train(shard(kind, dist.new_group(backend="nccl"), bf16=bf16), "cuda")


@two_gpus
@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_two_ranks(ranks: Pool, kind: str, bf16: bool) -> None:
    """Ranks see the same batches. Each rank trains half of every flat parameter."""
    for actual in ranks(trained, 2, kind=kind, bf16=bf16, timeout=120):
        check(actual, 3e-2 if bf16 else 1e-4)


def outputs(kind: str) -> tuple[Tensor, Tensor, Tensor]:
    """Return outputs with other weights after a forward pass that left the root gathered, and of a plain model."""
    torch.cuda.set_device(dist.get_rank())
    model = shard(kind, dist.new_group(backend="nccl"))
    twa = twa_scale.attach(model, candidates=candidates(build()))
    x = torch.ones(2, 32, device="cuda")
    plain = build().cuda()
    plain.load_state_dict(candidates(build())[1])
    with torch.no_grad():
        before = model(x)
        with twa.weights(1):
            return before.cpu(), model(x).cpu(), plain(x).cpu()


@two_gpus
@pytest.mark.parametrize("kind", KINDS)
def test_next_forward_uses_the_written_weights(ranks: Pool, kind: str) -> None:
    for before, displayed, expected in ranks(outputs, 2, kind=kind):
        torch.testing.assert_close(displayed, expected, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(before, expected, rtol=1e-3)
