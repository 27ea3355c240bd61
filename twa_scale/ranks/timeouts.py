"""How long ranks wait in collectives of groups that are not made by us."""

from contextlib import suppress
from datetime import timedelta

import torch
import torch.distributed as dist

from twa_scale.errors import RankError


def limit_waiting(seconds: float) -> None:
    """Let collectives of every process group of this rank fail after `seconds`. Not collective.

    Device meshes and DeepSpeed make groups with torch's own 10 or 30 minutes, whatever the default group has.

    Raises:
        RankError: a torch that does not let us.
    """
    if not dist.is_initialized():
        return
    module = dist.distributed_c10d
    world, set_timeout = getattr(module, "_world", None), getattr(module, "_set_pg_timeout", None)
    groups = getattr(world, "pg_map", None)
    if groups is None or set_timeout is None:
        raise RankError(
            f"timeout: torch {torch.__version__} has no torch.distributed.distributed_c10d._world.pg_map or "
            "_set_pg_timeout, by which groups get it; use a torch from 2.6 to 2.13."
        )
    for group in list(groups):
        if any(name in dist.get_backend_config(group) for name in ("gloo", "nccl")):  # others have none
            set_timeout(timedelta(seconds=seconds), group)


def default_timeout() -> timedelta | None:
    """Return how long ranks of the default group wait, for groups made after it; None where torch does not tell."""
    for device in ("cpu", "cuda"):
        with suppress(RuntimeError, AttributeError):  # no backend for this device, or one without a time-out
            timeout: timedelta = dist.group.WORLD._get_backend(torch.device(device)).options._timeout  # type: ignore[union-attr]
            return timeout
    return None
