"""The names of bases, stores and engines.

To add one, add its name here first. All code that depends on the name matches on it and ends with `assert_never`, so
the type checker lists the missing cases. See docs/extending.md.
"""

from dataclasses import dataclass
from typing import Literal, get_args

from typing_extensions import assert_never

BasisName = Literal["normalized", "orthonormal", "pca", "simplex"]
StoreName = Literal["dense32", "mapped", "dense16", "packed8", "packed4", "packed2", "packed1"]
EngineName = Literal["plain", "ddp", "fsdp2", "zero1", "zero2", "zero3"]

RowDtype = Literal["float32", "bfloat16", "int8"]
"""Types in which pods exchange the gradients of corrections per row."""

ServiceName = Literal["wandb", "mlflow"]
LoggerName = Literal["tensorboard", "csv", ServiceName]

STORES: tuple[StoreName, ...] = get_args(StoreName)
"""All stores, the most exact one first."""


@dataclass(frozen=True)
class DenseDeltas:
    """A store of deltas in a floating point dtype."""

    dtype: Literal["float32", "bfloat16"]


@dataclass(frozen=True)
class PackedDeltas:
    """A store of codes of a few bits, with one scale for each block of elements."""

    bits: Literal[8, 4, 2, 1]


@dataclass(frozen=True)
class MappedFiles:
    """A store without deltas, which computes them from the memory-mapped files of the candidates."""


StoreKind = DenseDeltas | PackedDeltas | MappedFiles


def store_kind(name: StoreName) -> StoreKind:
    """Return the kind of the store of this name."""
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
