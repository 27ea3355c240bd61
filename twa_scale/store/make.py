"""Choosing a store by its name in the configuration."""

import torch

from twa_scale.base.spans import Span
from twa_scale.config import TwaConfig
from twa_scale.errors import ConfigError
from twa_scale.kernels import Allocate, Coding, Dense, Kernels, Packed, choose_kernels, of_deltas, packed_bytes
from twa_scale.store.host_memory import in_large_pages
from twa_scale.store.in_memory import HeldStore
from twa_scale.store.mapped import Mapped, MappedStore
from twa_scale.store.offloaded import OffloadedStore
from twa_scale.store.store import Store

_DTYPES = {"dense32": torch.float32, "dense16": torch.bfloat16}
_BITS = {"packed8": 8, "packed4": 4, "packed2": 2, "packed1": 1}


def bits_of(name: str) -> int | None:
    """Return the bits of the codes of a packed store, None for other stores."""
    return _BITS.get(name)


def make_store(config: TwaConfig, n: int, device: torch.device, mapped: Mapped, coding: Coding | None = None) -> Store:
    """Return an empty store for n candidates of a model on `device`.

    Args:
        config: names the store.
        n: candidates.
        device: of the model.
        mapped: is asked for their tensors by store `mapped` only.
        coding: what the rows of a packed store stand for; deltas when not given.

    Raises:
        ConfigError: store `mapped` on a GPU.
    """
    kernels = choose_kernels(config.kernels, device)
    if config.store != "mapped":
        if config.store_device == "cpu" and device.type != "cpu":
            return OffloadedStore(lambda allocate: host_store(config, n, allocate, coding), device, kernels)
        return _held(config.store, n, device, kernels, coding)
    if device.type != "cpu":
        raise ConfigError(
            f"store: 'mapped' reads the candidates' files from the CPU's memory, but the model is on {device}. "
            "Use packed8 or packed4, or train on the CPU."
        )
    return MappedStore(n, mapped, kernels)


def host_store(config: TwaConfig, n: int, allocate: Allocate, coding: Coding | None = None) -> HeldStore:
    """Return the store on the CPU, in memory of `allocate`, of an `OffloadedStore`."""
    cpu = torch.device("cpu")
    kernels = choose_kernels("torch" if config.kernels == "torch" else "auto", cpu)  # the others named are a GPU's
    return _held(config.store, n, cpu, kernels, coding, allocate)


def _held(
    name: str,
    n: int,
    device: torch.device,
    kernels: Kernels,
    coding: Coding | None,
    allocate: Allocate = in_large_pages,
) -> HeldStore:
    def make(span: Span) -> Dense | Packed:
        if name in _DTYPES:
            return Dense.empty(n, len(span), _DTYPES[name], device, allocate)
        return Packed.empty(n, len(span), span.start, _BITS[name], device, allocate)

    return HeldStore(make, device, kernels, coding or of_deltas(n), allocate)


def span_bytes(name: str, n: int, elements: int) -> int:
    """Return what a span of trained elements costs: n deltas and the float32 center."""
    if name == "mapped":
        return 4 * elements
    if name in _DTYPES:
        return (n * _DTYPES[name].itemsize + 4) * elements
    return packed_bytes(n, elements, _BITS[name]) + 4 * elements
