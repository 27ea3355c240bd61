"""The store that the configuration names, and its size."""

from typing import Literal

import torch
from typing_extensions import assert_never

from twa_scale.base.spans import Span
from twa_scale.config import TwaConfig
from twa_scale.config.kinds import DenseDeltas, MappedFiles, PackedDeltas, StoreName, store_kind
from twa_scale.errors import ConfigError
from twa_scale.kernels import Allocate, Coding, Dense, Kernels, Packed, choose_kernels, of_deltas, packed_bytes
from twa_scale.store.host_memory import zeros_in_huge_pages
from twa_scale.store.in_memory import InMemoryStore
from twa_scale.store.mapped import Mapped, MappedStore
from twa_scale.store.offloaded import OffloadedStore
from twa_scale.store.store import Store


def bits_of(name: StoreName) -> int | None:
    """Return the bits of the codes of a packed store, None for other stores."""
    kind = store_kind(name)
    return kind.bits if isinstance(kind, PackedDeltas) else None


def make_store(config: TwaConfig, n: int, device: torch.device, mapped: Mapped, coding: Coding | None = None) -> Store:
    """Return an empty store for n candidates of a model on `device`.

    Args:
        config: names the store.
        n: the number of candidates.
        device: the device of the model.
        mapped: returns the tensors of the candidates, for store `mapped` only.
        coding: the meaning of the rows of a packed store; by default, deltas.

    Raises:
        ConfigError: store `mapped` on a GPU.
    """
    kernels, kind = choose_kernels(config.kernels, device), store_kind(config.store)
    if not isinstance(kind, MappedFiles):
        if config.store_device == "cpu" and device.type != "cpu":
            return OffloadedStore(lambda allocate: host_store(config, n, allocate, coding), device, kernels)
        return _in_memory(kind, n, device, kernels, coding)
    if device.type != "cpu":
        raise ConfigError(
            f"store: 'mapped' reads the candidates' files from the CPU's memory, but the model is on {device}. "
            "Use packed8 or packed4, or train on the CPU."
        )
    return MappedStore(n, mapped, kernels)


def host_store(config: TwaConfig, n: int, allocate: Allocate, coding: Coding | None = None) -> InMemoryStore:
    """Return the store in host memory of an `OffloadedStore`, allocated by `allocate`."""
    cpu, kind = torch.device("cpu"), store_kind(config.store)
    assert not isinstance(kind, MappedFiles)
    kernels = choose_kernels("torch" if config.kernels == "torch" else "auto", cpu)  # other names are kernels of a GPU
    return _in_memory(kind, n, cpu, kernels, coding, allocate)


def _in_memory(
    kind: DenseDeltas | PackedDeltas,
    n: int,
    device: torch.device,
    kernels: Kernels,
    coding: Coding | None,
    allocate: Allocate = zeros_in_huge_pages,
) -> InMemoryStore:
    def make(span: Span) -> Dense | Packed:
        match kind:
            case DenseDeltas(dtype):
                return Dense.empty(n, len(span), torch_dtype(dtype), device, allocate)
            case PackedDeltas(bits):
                return Packed.empty(n, len(span), span.start, bits, device, allocate)
            case _:
                assert_never(kind)

    return InMemoryStore(make, device, kernels, coding or of_deltas(n), allocate)


def torch_dtype(name: Literal["float32", "bfloat16"]) -> torch.dtype:
    """Return the type of this name."""
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]


def span_bytes(name: StoreName, n: int, elements: int) -> int:
    """Return the bytes of a span of trained elements: the n deltas, which `mapped` does not hold, and the center."""
    match store_kind(name):
        case DenseDeltas(dtype):
            return (n * torch_dtype(dtype).itemsize + 4) * elements
        case PackedDeltas(bits):
            return packed_bytes(n, elements, bits) + 4 * elements
        case MappedFiles():
            return 4 * elements
        case kind:
            assert_never(kind)
