"""Reductions through groups of another backend: all ranks create them, and their members use and destroy them."""

from typing import Any

import pytest
import torch
import torch.distributed as dist

import twa_scale
from tests import models
from tests.pool import Pool
from twa_scale.errors import ConfigError
from twa_scale.ranks import Group, reduction


def over_new_groups() -> list[list[float]]:
    """Return sums over a group of ranks 0 and 2 and over all ranks, twice, because group names may repeat."""
    rank = dist.get_rank()
    subset = dist.new_group([0, 2])
    local = Group.alone() if rank == 1 else Group(subset)
    sums = []
    for _ in range(2):
        # No group has a backend for this device type, so new groups are created.
        made = reduction._over_torch("gloo", torch.device("meta"), [local, Group(None)])
        assert made[1].size == 3 and (made[0] is local) == (rank == 1)
        sums.append([group.sum_(torch.tensor(rank + 1.0, dtype=torch.float64)).item() for group in made])
        for group, own in zip(made, [local, None], strict=True):
            if group is not own:
                group.close()
    return sums


def test_new_groups_have_the_same_ranks(ranks: Pool) -> None:
    assert ranks(over_new_groups, 3) == [[[4.0, 6.0]] * 2, [[2.0, 6.0]] * 2, [[4.0, 6.0]] * 2]


def attach(engine: str, comm: str) -> Any:
    model = models.wrap(models.build(scalar_shape=(1,)), engine)
    twa = twa_scale.attach(model, models.candidates(scalar_shape=(1,)), {"comm": comm})
    models.loss(model, models.part(models.batch(0), dist.get_rank(), dist.get_world_size())).backward()
    twa.step()
    coefficients = twa.coefficients.clone()
    twa.close()
    return coefficients


@pytest.mark.parametrize("engine", ["plain", pytest.param("ddp", marks=pytest.mark.slow), "fsdp2"])
def test_gloo_equals_auto_on_cpu(ranks: Pool, engine: str) -> None:
    auto, gloo = (ranks(attach, 2, engine=engine, comm=comm) for comm in ("auto", "gloo"))
    assert all(torch.equal(item, auto[0]) for item in auto + gloo)


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what is missing where there is no GPU")
def test_nccl_needs_gpus(ranks: Pool) -> None:
    assert "needs a GPU on every rank" in str(ranks.error(attach, 2, engine="fsdp2", comm="nccl"))


@pytest.mark.parametrize("engine", ["plain", "fsdp2"])
def test_mpi_needs_mpirun(ranks: Pool, engine: str) -> None:
    """The check does not initialize MPI, which would start every rank as a singleton."""
    error = ranks.error(attach, 2, engine=engine, comm="mpi")
    assert isinstance(error, ConfigError) and "started 1 of 2" in str(error) and "mpirun" in str(error)


def test_single_process_accepts_every_comm() -> None:
    for comm in ("auto", "gloo", "mpi"):
        twa_scale.attach(models.build(), models.candidates(), {"comm": comm}).close()
