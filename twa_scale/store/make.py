"""Choosing a store by its name in the configuration."""

import torch

from twa_scale.store.dense import DenseStore
from twa_scale.store.protocol import Store

_DTYPES = {"dense32": torch.float32, "dense16": torch.bfloat16}


def make_store(name: str, n: int, device: torch.device) -> Store:
    """Return an empty store for n candidates on `device`."""
    return DenseStore(n, _DTYPES[name], device)


def bytes_per_element(name: str, n: int) -> float:
    """Return what one trained element costs: n deltas and the float32 center."""
    return n * _DTYPES[name].itemsize + 4
