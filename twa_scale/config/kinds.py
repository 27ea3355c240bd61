"""The kinds of bases, stores and engines that a configuration names.

A new kind is added here first. Every place that must know it matches on the name and ends with `assert_never`, so the
type checker lists what is missing. See docs/extending.md.
"""

from dataclasses import dataclass
from typing import Literal, get_args

from typing_extensions import assert_never

BasisName = Literal["normalized", "orthonormal", "pca", "simplex"]
StoreName = Literal["dense32", "mapped", "dense16", "packed8", "packed4", "packed2", "packed1"]
EngineName = Literal["plain", "ddp", "fsdp2", "zero1", "zero2", "zero3"]

STORES: tuple[StoreName, ...] = get_args(StoreName)
"""The most exact first."""


@dataclass(frozen=True)
class DenseDeltas:
    """A store that holds deltas as they are."""

    dtype: Literal["float32", "bfloat16"]


@dataclass(frozen=True)
class PackedDeltas:
    """A store that holds codes of a few bits, with one scale for each block of elements."""

    bits: Literal[8, 4, 2, 1]


@dataclass(frozen=True)
class MappedFiles:
    """A store that holds no deltas: they are computed from the candidates' files, mapped into memory."""


StoreKind = DenseDeltas | PackedDeltas | MappedFiles


def store_kind(name: StoreName) -> StoreKind:
    """Return how the store of this name holds the deltas."""
    match name:
        case "dense32":
            return DenseDeltas("float32")
        case "dense16":
            return DenseDeltas("bfloat16")
        case "packed8":
            return PackedDeltas(8)
        case "packed4":
            return PackedDeltas(4)
        case "packed2":
            return PackedDeltas(2)
        case "packed1":
            return PackedDeltas(1)
        case "mapped":
            return MappedFiles()
        case _:
            assert_never(name)
