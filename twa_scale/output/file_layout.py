"""Which tensor lies at which byte of which file: headers and index, before any value is known."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

import torch

from twa_scale.candidates.formats.safetensors import DTYPES
from twa_scale.errors import ConfigError, OutputError

_KINDS = {dtype: kind for kind, dtype in DTYPES.items()}
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
    pairs: bool = False
    """Whether it is complex in the file: the last dimension, of 2, is that of real and imaginary part."""

    @property
    def numel(self) -> int:
        """Number of elements; a scalar has one."""
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Size in the file."""
        return self.numel * self.dtype.itemsize


def stored_as(own: torch.dtype, wanted: torch.dtype | None) -> torch.dtype:
    """Return the type that a tensor is written in: `wanted`, if any, for floating point tensors, else its own."""
    return wanted if wanted is not None and own.is_floating_point else own


def check_dtype(wanted: object) -> None:
    """Refuse what is no type that floating point tensors can be written in.

    Raises:
        ConfigError: names the value.
    """
    if wanted is not None and not (isinstance(wanted, torch.dtype) and wanted.is_floating_point):
        raise ConfigError(f"dtype: {wanted!r} is no floating point type of torch; give one like torch.bfloat16.")


def spec_of(
    name: str,
    shape: tuple[int, ...],
    own: torch.dtype,
    wanted: torch.dtype | None,
    *,
    pairs: bool = False,
) -> TensorSpec:
    """Return the tensor as it is written: see `stored_as`. The parts of a complex one are float32 at least."""
    dtype = stored_as(own, wanted)
    return TensorSpec(name, shape, torch.float32 if pairs and dtype.itemsize < 4 else dtype, pairs)


@dataclass(frozen=True)
class Shard:
    """One file."""

    file: str
    header: bytes
    """The first bytes of the file: the length of the JSON, then the JSON."""
    offsets: dict[str, int]
    """Byte at which each tensor starts, from the start of the file."""
    nbytes: int
    """Size of the whole file."""


def lay_out(
    specs: Sequence[TensorSpec], max_shard_size: int, base: str = "model", metadata: Mapping[str, str] | None = None
) -> list[Shard]:
    """Put the tensors, in order, into files of at most `max_shard_size` bytes; a larger tensor has its own.

    Names are those of Hugging Face: `model.safetensors`, or `model-00001-of-0000N.safetensors`, with `base` in place of
    "model". Every header has `metadata`.

    Raises:
        OutputError: a type that the format does not have.
    """
    for spec in specs:
        if spec.pairs and spec.dtype != torch.float32:
            raise OutputError(
                f"tensor {spec.name!r}: the format cannot hold complex128; choose dtype float32, which makes it "
                "complex64."
            )
        if spec.dtype not in _KINDS:
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
    """Return the name of the index of several files."""
    return f"{base}.safetensors.index.json"


def _shard(file: str, specs: list[TensorSpec], metadata: Mapping[str, str]) -> Shard:
    entries: dict[str, object] = {"__metadata__": {**metadata, "format": "pt"}}
    begins = {}
    end = 0
    # Widest types first: readers view the bytes as the type in place, which needs aligned starts.
    for spec in sorted(specs, key=lambda spec: -spec.dtype.itemsize * (2 if spec.pairs else 1)):
        begins[spec.name] = end
        end += spec.nbytes
        offsets = [begins[spec.name], end]
        entries[spec.name] = {
            "dtype": _KINDS[torch.complex64 if spec.pairs else spec.dtype],
            "shape": list(spec.shape[:-1] if spec.pairs else spec.shape),
            "data_offsets": offsets,
        }
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    offsets_in_file = {name: start + begin for name, begin in begins.items()}
    return Shard(file, len(text).to_bytes(8, "little") + text, offsets_in_file, start + end)


def index_of(shards: Sequence[Shard], specs: Sequence[TensorSpec]) -> bytes:
    """Return the Hugging Face index of several files."""
    weight_map = {name: shard.file for shard in shards for name in shard.offsets}
    total = sum(spec.nbytes for spec in specs)
    return (json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2) + "\n").encode()


def parse_size(size: str | int) -> int:
    """Return the bytes that "5GB" (10^9 each), "512MiB" (2^20 each) or a number that is no text means.

    Raises:
        ConfigError: anything else, a text without a unit, or no byte at all.
    """
    match = re.fullmatch(r"\s*(\d+\.?\d*)\s*([KMGT]I?)?B?\s*", str(size).upper())
    if match and isinstance(size, str) and size.strip()[-1] in "0123456789.":
        raise ConfigError(f"size {size!r}: has no unit; write it like 5GB, 500MB or 2GiB, or with B for bytes.")
    nbytes = int(float(match[1]) * _UNITS[match[2] or ""]) if match else 0
    if nbytes < 1:
        raise ConfigError(f"size {size!r}: write it like 5GB, 500MB or 2GiB.")
    return nbytes
