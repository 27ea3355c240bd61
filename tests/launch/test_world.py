"""`World.from_environment` with the variables that launchers set."""

from typing import Any

import pytest

from twa_scale.errors import ConfigError
from twa_scale.ranks.world import World, mpi_size

TORCHRUN = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}
MASTER = {"MASTER_ADDR": "n1", "MASTER_PORT": "29501"}
OPEN_MPI = {"OMPI_COMM_WORLD_RANK": "2", "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_RANK": "0"}
HYDRA = {"PMI_RANK": "5", "PMI_SIZE": "6", "MPI_LOCALRANKID": "2"}
PALS = {"PMI_RANK": "5", "PMI_SIZE": "6", "PMI_LOCAL_RANK": "2"}
BATCH = {"SLURM_JOB_ID": "7", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "4", "SLURM_NPROCS": "4"}
STEP = BATCH | {"SLURM_STEP_ID": "1", "SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "3", "SLURM_LOCALID": "1"}
INTERACTIVE = BATCH | {"SLURM_STEP_ID": "4294967290", "SLURM_STEP_NUM_TASKS": "1"}  # salloc, with a step of its own
ALONE = (0, 1, 0)


@pytest.mark.parametrize(
    ("environment", "place", "launcher"),
    [
        ({}, ALONE, ""),
        (TORCHRUN, (3, 8, 1), "torchrun"),
        (OPEN_MPI, (2, 4, 0), "mpi"),
        (HYDRA, (5, 6, 2), "mpi"),
        (PALS, (5, 6, 2), "mpi"),
        (STEP, (3, 4, 1), "slurm"),
        (BATCH, ALONE, ""),
        (INTERACTIVE, ALONE, "slurm"),
        (TORCHRUN | STEP, (3, 8, 1), "torchrun"),  # srun torchrun
        (TORCHRUN | OPEN_MPI, (3, 8, 1), "torchrun"),  # mpirun torchrun
        (OPEN_MPI | STEP, (2, 4, 0), "mpi"),  # mpirun starts its daemons with srun
        (OPEN_MPI | BATCH, (2, 4, 0), "mpi"),
        (HYDRA | STEP, (5, 6, 2), "mpi"),
        (STEP | {"PMI_RANK": "3", "PMI_SIZE": "4"}, (3, 4, 1), "slurm"),  # srun --mpi=pmi2
        (STEP | {"SLURM_NTASKS": "9"}, (3, 4, 1), "slurm"),  # of the job, not of the step
    ],
)
def test_rank_size_and_local_rank(environment: dict[str, str], place: Any, launcher: str) -> None:
    world = World.from_environment(environment)
    assert (world.rank, world.size, world.local_rank, world.launcher) == (*place, launcher)


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"RANK": "0"}, ["RANK=0", "WORLD_SIZE", "LOCAL_RANK"]),
        ({"RANK": "0", "WORLD_SIZE": "2"}, ["but not LOCAL_RANK"]),
        ({"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "2"}, ["but not OMPI_COMM_WORLD_LOCAL_RANK"]),
        ({"PMI_SIZE": "2"}, ["PMI_SIZE=2", "but not PMI_RANK"]),
        ({k: v for k, v in STEP.items() if k != "SLURM_PROCID"}, ["but not SLURM_PROCID"]),
        (TORCHRUN | {"RANK": "8"}, ["RANK=8", "WORLD_SIZE=8"]),
        (TORCHRUN | {"RANK": "-1"}, ["RANK=-1"]),
        (TORCHRUN | {"WORLD_SIZE": "two"}, ["WORLD_SIZE=two", "whole numbers"]),
        (STEP | {"MASTER_ADDR": "n1"}, ["MASTER_ADDR", "MASTER_PORT"]),
    ],
)
def test_errors_name_invalid_variables(environment: dict[str, str], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        World.from_environment(environment)
    for word in words:
        assert word in str(caught.value)


def test_each_launch_has_a_unique_name() -> None:
    def job(environment: dict[str, str]) -> str:
        return World.from_environment(environment).job

    names = [
        job(STEP),
        job(STEP | {"SLURM_JOB_ID": "8"}),
        job(STEP | {"SLURM_STEP_ID": "2"}),
        job(STEP | {"SLURM_RESTART_COUNT": "1"}),  # the same job, requeued
        job(OPEN_MPI | {"PMIX_NAMESPACE": "prterun-n1-4242@1"}),
        job(OPEN_MPI | {"PMIX_NAMESPACE": "prterun-n1-4243@1"}),
    ]
    assert all(names) and len(set(names)) == len(names)
    assert all(set(name) <= set("abcdefghijklmnopqrstuvwxyz0123456789-.") for name in names)
    assert job(TORCHRUN) == job(HYDRA) == job({}) == ""


def test_has_master() -> None:
    assert World.from_environment(TORCHRUN | MASTER).has_master and World.from_environment(STEP | MASTER).has_master
    assert not World.from_environment(STEP).has_master


@pytest.mark.parametrize(
    ("environment", "size"),
    [({}, 1), (TORCHRUN, 1), (TORCHRUN | OPEN_MPI, 4), (STEP, 4), (BATCH, 1), (HYDRA, 6), (STEP | HYDRA, 6)],
)
def test_mpi_size(environment: dict[str, str], size: int) -> None:
    assert mpi_size(environment) == size
