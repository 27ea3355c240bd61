"""Time limits of the collectives of process groups, including groups that other libraries made."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta

import torch
import torch.distributed as dist

from twa_scale.errors import RankError
from twa_scale.version import TESTED_TORCH


def process_groups() -> list[dist.ProcessGroup] | None:
    """Return all process groups of this rank; None if this version of torch does not list them."""
    world = getattr(dist.distributed_c10d, "_world", None)
    groups = getattr(world, "pg_map", None)
    return None if groups is None else list(groups)


def set_collective_timeout(seconds: float) -> None:
    """Set the time limit of the collectives of every process group of this rank. Not collective.

    Device meshes and DeepSpeed create groups with torch's default of 10 or 30 minutes, not with that of the default
    group.

    Args:
        seconds: the time limit.

    Raises:
        RankError: this version of torch lacks the private attributes that are used.
    """
    if not dist.is_initialized():
        return
    groups, set_timeout = process_groups(), getattr(dist.distributed_c10d, "_set_pg_timeout", None)
    if groups is None or set_timeout is None:
        raise RankError(
            f"timeout: torch {torch.__version__} has no torch.distributed.distributed_c10d._world.pg_map or "
            f"_set_pg_timeout, which set the time limit of groups; use torch {TESTED_TORCH}."
        )
    for group in groups:
        if any(name in dist.get_backend_config(group) for name in ("gloo", "nccl")):  # Other backends have no limit.
            set_timeout(timedelta(seconds=seconds), group)


@contextmanager
def default_of_new_groups(seconds: float) -> Iterator[None]:
    """Set the time limit of gloo groups that are created in a `with` block without one, if torch cannot set it later.

    `set_collective_timeout` has no effect on gloo before torch 2.9 (pytorch/pytorch#158128).

    Args:
        seconds: the time limit.
    """
    module = dist.distributed_c10d
    if hasattr(dist.ProcessGroup, "set_timeout") or not hasattr(module, "default_pg_timeout"):
        yield
        return
    before = module.default_pg_timeout
    module.default_pg_timeout = timedelta(seconds=seconds)
    try:
        yield
    finally:
        module.default_pg_timeout = before


def default_timeout() -> timedelta | None:
    """Return the time limit of the default process group; None if torch does not expose it."""
    for device in ("cpu", "cuda"):
        with suppress(RuntimeError, AttributeError):  # no backend for this device, or one without a time limit
            timeout: timedelta = dist.group.WORLD._get_backend(torch.device(device)).options._timeout  # type: ignore[union-attr]
            return timeout
    return None
