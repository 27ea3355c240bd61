"""Which rank this process is, read once from the launcher's variables, and the process group that they make."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist

from twa_scale.errors import ConfigError


@dataclass(frozen=True)
class World:
    """The place of this process among the ranks of the run."""

    rank: int
    size: int
    local_rank: int

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> "World":
        """Read the variables of torchrun; without them this process is alone.

        Raises:
            ConfigError: some of the variables are set and others are not.
        """
        keys = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
        found = [key for key in keys if key in environment]
        if not found:
            return cls(0, 1, 0)
        if len(found) < len(keys):
            raise ConfigError(
                f"the environment sets {', '.join(found)} but not all of {', '.join(keys)}; use torchrun."
            )
        return cls(*(int(environment[key]) for key in keys))

    def device(self, wanted: str = "auto") -> torch.device:
        """Return the device of this rank: `cpu`, `cuda`, or `auto` for a GPU where there is one.

        Raises:
            ConfigError: `cuda` is wanted and there is none.
        """
        available = torch.cuda.is_available()
        if wanted == "cuda" and not available:
            raise ConfigError("device: 'cuda' is asked for, but torch sees no GPU; use cpu or auto.")
        if wanted == "cpu" or not available:
            return torch.device("cpu")
        return torch.device("cuda", self.local_rank)

    @contextmanager
    def joined(self, device: torch.device) -> Iterator[None]:
        """Be part of the process group in a `with` block: NCCL on GPUs, gloo on CPUs, none when alone."""
        if device.type == "cuda":
            torch.cuda.set_device(device)
        if self.size == 1 or dist.is_initialized():
            yield
            return
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
        try:
            yield
        finally:
            dist.destroy_process_group()
