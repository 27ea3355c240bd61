"""safetensors files: the header is parsed once, and tensors are read by exact byte ranges."""

from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch

from twa_scale.base.inputs import MAX_JSON, brief, parse_json
from twa_scale.base.urls import Url
from twa_scale.candidates.formats.file_handles import File
from twa_scale.candidates.formats.origin import Origin
from twa_scale.candidates.formats.remote_file import RemoteFile, check_once_at_end
from twa_scale.candidates.other_formats import format_of
from twa_scale.candidates.wrapper_names import unwrapped
from twa_scale.errors import CandidateError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
}
_MAX_DIMS = 64  # the limit of torch


@dataclass(frozen=True)
class Entry:
    """The dtype, shape and position of a tensor in the file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    """The first byte, counted from the start of the file."""


class SafetensorsCandidate:
    """A candidate in one .safetensors file. A read transfers only the bytes of its slice."""

    def __init__(self, path: Path | Url, directory: Path | None = None, label: str | None = None) -> None:
        self.label = label or str(path)
        is_remote = isinstance(path, Url)
        self.origin = Origin("a safetensors file at a URL") if is_remote else Origin("a safetensors file", "hf")
        self.directory = directory
        self.file_name: str | None = path.name
        self.bytes_read = 0
        self._file = RemoteFile(path) if isinstance(path, Url) else File(path)
        try:
            with check_once_at_end():
                entries, self.metadata = read_header(self._file)
            if (library := self.metadata.get("format")) in ("flax", "tf"):
                raise CandidateError(
                    f"{path}: is of {'Flax (JAX)' if library == 'flax' else 'TensorFlow'} by its header (format: "
                    f"{library}), whose names and layouts are not those of PyTorch. Convert it, and save that model."
                )
            self.stored_names = unwrapped(entries, str(path))
            self._entries = {name: entries[raw] for name, raw in self.stored_names.items()}
        except BaseException:
            self.close()
            raise

    def names(self) -> list[str]:
        """Return the tensor names without the prefixes of wrappers, sorted."""
        return list(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor."""
        return self._entries[name].shape

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype of a tensor, which is that of the tensors given to `read`."""
        return self._entries[name].dtype

    def read(self, name: str, start: int, out: torch.Tensor) -> None:
        """Fill `out` with the elements that begin at `start`, from the file without an intermediate copy."""
        entry = self._entries[name]
        assert out.dtype == entry.dtype and start + out.numel() <= prod(entry.shape)
        begin = entry.offset + start * out.itemsize
        self._file.read(out.view(torch.uint8).numpy().data, begin, f"tensor {name!r}")
        self.bytes_read += out.nbytes

    def mapped(self, name: str) -> torch.Tensor | None:
        """Return a flat view of a whole tensor in the mapped file.

        Return None if the tensor is not aligned, or the file is one of another machine.
        """
        if isinstance(self._file, RemoteFile):
            return None
        entry = self._entries[name]
        if entry.offset % entry.dtype.itemsize or not prod(entry.shape):
            return None if prod(entry.shape) else torch.empty(0, dtype=entry.dtype)
        return self._file.mapped(entry.offset, prod(entry.shape), entry.dtype)

    def close(self) -> None:
        """Close the file. Mapped tensors remain valid."""
        self._file.close()


def read_header(file: File | RemoteFile) -> tuple[dict[str, Entry], dict[str, str]]:
    """Parse the header, and check it against the size of the file.

    Returns:
        The entry of each tensor by name, and the metadata of the file.

    Raises:
        CandidateError: the file is damaged, truncated or not a safetensors file.
    """
    label, size = file.path, file.size
    head = bytearray(min(16, size))
    file.read(memoryview(head), 0, "the header")
    if format_name := format_of(head, size, safetensors=True):
        raise CandidateError(f"{label}: {format_name}")
    if size < 8:
        raise CandidateError(
            f"{label}: has {size} bytes, too few for a safetensors file; it is truncated. Copy it again."
        )
    length = int.from_bytes(head[:8], "little")
    if length > min(size - 8, MAX_JSON):
        raise CandidateError(
            f"{label}: its first 8 bytes give a header of {length} bytes, but {size - 8} bytes follow; it is not a "
            "safetensors file, or it is truncated. Write or copy it again."
        )
    raw = bytearray(length)
    file.read(memoryview(raw), 8, "the header")
    try:
        header = parse_json(raw)
        if not isinstance(header, dict):
            raise ValueError(f"it is a {type(header).__name__}")
        metadata = header.pop("__metadata__", None) or {}
        if not isinstance(metadata, dict):
            raise ValueError(f"its __metadata__ is a {type(metadata).__name__}")
        texts = metadata.items()
        entries = [(_entry(name, value, 8 + length, label), name) for name, value in header.items()]
    except ValueError as error:
        raise CandidateError(
            f"{label}: the header is not the JSON of a safetensors file ({error}). Write the file again."
        ) from error
    if not entries:
        raise CandidateError(f"{label}: holds no tensors. Write it again from a model's state dict.")
    _check_tiling(entries, 8 + length, size, label)
    return {name: entry for entry, name in entries}, {key: text for key, text in texts if isinstance(text, str)}


def _entry(name: str, value: Any, data_start: int, label: str) -> Entry:
    subject = f"{label}: tensor {name!r}"
    try:
        kind, shape, (begin, end) = value["dtype"], tuple(value["shape"]), value["data_offsets"]
        numbers = (*shape, begin, end)
    except (KeyError, TypeError, ValueError) as error:
        raise CandidateError(
            f"{subject}: the header must give its dtype, shape and two data_offsets, not {brief(value)}. Write the "
            "file again."
        ) from error
    if len(shape) > _MAX_DIMS or any(type(number) is not int or not 0 <= number < 1 << 63 for number in numbers):
        raise CandidateError(
            f"{subject}: shape and data_offsets must be 64-bit integers from 0 on, at most {_MAX_DIMS} in a "
            f"shape, not {brief(value)}. Write the file again."
        )
    if not isinstance(kind, str) or kind not in DTYPES:
        raise CandidateError(
            f"{subject}: dtype {brief(kind)} is not supported; supported: {', '.join(DTYPES)}. Convert the tensor."
        )
    needed = prod(shape) * DTYPES[kind].itemsize
    if end - begin != needed:
        raise CandidateError(
            f"{subject}: shape {list(shape)} of {kind} needs {needed} bytes, but its data_offsets [{begin}, "
            f"{end}] hold {end - begin}. Write the file again."
        )
    return Entry(DTYPES[kind], shape, data_start + begin)


def _check_tiling(entries: list[tuple[Entry, str]], data_start: int, size: int, label: str) -> None:
    """Check that the tensors fill the file from the header to its end without gap or overlap."""
    end = data_start
    for entry, name in sorted(entries, key=lambda item: (item[0].offset, prod(item[0].shape))):
        if entry.offset != end:
            raise CandidateError(
                f"{label}: tensor {name!r} starts at byte {entry.offset} where {end} was expected: the header has a "
                "gap or an overlap. Write the file again."
            )
        end += prod(entry.shape) * entry.dtype.itemsize
        if end > size:
            raise CandidateError(
                f"{label}: tensor {name!r} ends at byte {end}, but the file has {size} bytes; it is truncated. Copy it "
                "again, or leave this candidate out if its writer failed."
            )
    if end != size:
        raise CandidateError(
            f"{label}: {size - end} bytes follow the last tensor, where the file must end. Write the file again."
        )
