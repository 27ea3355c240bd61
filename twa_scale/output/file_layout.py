"""The layout of safetensors files: the byte offset of every tensor, the headers and the index."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

import torch

from twa_scale.candidates.formats.safetensors import DTYPES
from twa_scale.errors import ConfigError, OutputError

_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_UNITS = {
    "": 1,
    "K": 10**3,
    "M": 10**6,
    "G": 10**9,
    "T": 10**12,
    "KI": 2**10,
    "MI": 2**20,
    "GI": 2**30,
    "TI": 2**40,
}


@dataclass(frozen=True)
class TensorSpec:
    """A tensor to be written."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    as_complex: bool = False
    """Whether the file holds complex numbers. The last dimension, of size 2, is that of real and imaginary parts."""

    @property
    def numel(self) -> int:
        """The number of elements; 1 for a scalar."""
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        """The size in the file, in bytes."""
        return self.numel * self.dtype.itemsize


def stored_as(source_dtype: torch.dtype, dtype: torch.dtype | None) -> torch.dtype:
    """Return the type that a tensor is written in: `dtype`, if given, for floating point; else `source_dtype`."""
    return dtype if dtype is not None and source_dtype.is_floating_point else source_dtype


def check_dtype(dtype: object) -> None:
    """Check that `dtype` is None or a floating point type of torch.

    Raises:
        ConfigError: it is not.
    """
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ConfigError(f"dtype: {dtype!r} is not a floating point type of torch; give one like torch.bfloat16.")


def spec_of(
    name: str,
    shape: tuple[int, ...],
    source_dtype: torch.dtype,
    dtype: torch.dtype | None,
    *,
    as_complex: bool = False,
) -> TensorSpec:
    """Return the spec of a tensor whose type in the file is `stored_as(own, dtype)`, or float32 if narrower complex."""
    stored = stored_as(source_dtype, dtype)
    return TensorSpec(name, shape, torch.float32 if as_complex and stored.itemsize < 4 else stored, as_complex)


@dataclass(frozen=True)
class Shard:
    """The layout of one file."""

    file: str
    """The name of the file."""
    header: bytes
    """The first bytes of the file: the length of the JSON (8 bytes, little-endian), then the JSON."""
    offsets: dict[str, int]
    """The byte offset of each tensor from the start of the file."""
    nbytes: int
    """The size of the file in bytes."""


def lay_out(
    specs: Sequence[TensorSpec], max_shard_size: int, base: str = "model", metadata: Mapping[str, str] | None = None
) -> list[Shard]:
    """Assign the tensors, in order, to files of at most `max_shard_size` bytes; a larger tensor gets its own file.

    The names are those of Hugging Face: `model.safetensors`, or `model-00001-of-0000N.safetensors`, with `base` instead
    of "model".

    Args:
        specs: the tensors.
        max_shard_size: the maximum size of a file's tensors, in bytes.
        base: the name of the files without suffix and number.
        metadata: the metadata of every header.

    Raises:
        OutputError: safetensors does not support the type of a tensor.
    """
    for spec in specs:
        if spec.as_complex and spec.dtype != torch.float32:
            raise OutputError(
                f"tensor {spec.name!r}: the format cannot hold complex128; choose dtype float32, which makes it "
                "complex64."
            )
        if spec.dtype not in _DTYPE_NAMES:
            raise OutputError(f"tensor {spec.name!r}: the format cannot hold {spec.dtype}; choose another dtype.")
    files: list[list[TensorSpec]] = [[]]
    size = 0
    for spec in specs:
        if files[-1] and size + spec.nbytes > max_shard_size:
            files.append([])
            size = 0
        files[-1].append(spec)
        size += spec.nbytes
    if len(files) == 1:
        return [_shard(f"{base}.safetensors", files[0], metadata or {})]
    number = len(files)
    names = [f"{base}-{i:05d}-of-{number:05d}.safetensors" for i in range(1, number + 1)]
    return [_shard(name, file, metadata or {}) for name, file in zip(names, files, strict=True)]


def index_name(base: str) -> str:
    """Return the file name of the index."""
    return f"{base}.safetensors.index.json"


def _shard(file: str, specs: list[TensorSpec], metadata: Mapping[str, str]) -> Shard:
    entries: dict[str, object] = {"__metadata__": {**metadata, "format": "pt"}}
    begins = {}
    end = 0
    # Widest types first: readers view the bytes in place as the type, which requires aligned offsets.
    for spec in sorted(specs, key=lambda spec: -spec.dtype.itemsize * (2 if spec.as_complex else 1)):
        begins[spec.name] = end
        end += spec.nbytes
        offsets = [begins[spec.name], end]
        entries[spec.name] = {
            "dtype": _DTYPE_NAMES[torch.complex64 if spec.as_complex else spec.dtype],
            "shape": list(spec.shape[:-1] if spec.as_complex else spec.shape),
            "data_offsets": offsets,
        }
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    offsets_in_file = {name: start + begin for name, begin in begins.items()}
    return Shard(file, len(text).to_bytes(8, "little") + text, offsets_in_file, start + end)


def index_of(shards: Sequence[Shard], specs: Sequence[TensorSpec]) -> bytes:
    """Return the content of the Hugging Face index of several files."""
    weight_map = {name: shard.file for shard in shards for name in shard.offsets}
    total = sum(spec.nbytes for spec in specs)
    return (json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2) + "\n").encode()


def parse_size(size: str | int) -> int:
    """Return the number of bytes of a size such as "5GB" (10^9 bytes each), "512MiB" (2^20 bytes each) or 1000.

    Raises:
        ConfigError: the size is not valid, is a string without a unit, or is less than one byte.
    """
    match = re.fullmatch(r"\s*(\d+\.?\d*)\s*([KMGT]I?)?B?\s*", str(size).upper())
    if match and isinstance(size, str) and size.strip()[-1] in "0123456789.":
        raise ConfigError(f"size {size!r}: has no unit; write it like 5GB, 500MB or 2GiB, or with B for bytes.")
    nbytes = int(float(match[1]) * _UNITS[match[2] or ""]) if match else 0
    if nbytes < 1:
        raise ConfigError(f"size {size!r}: write it like 5GB, 500MB or 2GiB.")
    return nbytes
