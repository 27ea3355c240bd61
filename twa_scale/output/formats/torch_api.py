"""The private API of torch that is used. It is checked before it is used."""

from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from twa_scale.errors import OutputError

_TESTED = "2.6 to 2.14"
_PROBE_BYTES = 1 << 16
BESIDE_NUMBERS = 4096
"""The bytes that an archive of torch.save has for each tensor beside its numbers, at most."""
_PLACES = {
    "FakeTensorMode": "torch._subclasses.fake_tensor",
    "skip_data": "torch.serialization",
    "_StorageInfo": "torch.distributed.checkpoint.filesystem",
}


def without_values(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Return a tensor without memory, which `save_without_values` takes."""
    with _found("FakeTensorMode")():
        return torch.empty(shape, dtype=dtype)


def save_without_values(content: Any, path: Path, nbytes: int) -> None:
    """Write the file that torch.save writes of `content`, with holes for the values of `without_values`.

    Args:
        content: the value to save.
        path: the file.
        nbytes: the size of all tensors in bytes.

    Raises:
        OSError: the disk is full or fails.
    """
    try:
        with _found("skip_data")(materialize_fake_tensors=True):
            torch.save(content, path)
        if path.stat().st_size < nbytes:  # torch 2.6 raises no error
            raise RuntimeError("the file is truncated")
    except RuntimeError as error:  # torch does not say which system call has failed: try them
        with path.open("wb", buffering=0) as file:
            file.write(bytes(_PROBE_BYTES))
            file.truncate(nbytes)
        raise OSError(f"torch.save failed ({str(error).splitlines()[0]})") from error


def storage_info(file: str, offset: int, length: int) -> Any:
    """Return the object by which the metadata of DCP say where a chunk is."""
    return _found("_StorageInfo")(file, offset, length)


def _found(name: str) -> Any:
    try:
        return getattr(import_module(_PLACES[name]), name)
    except (ImportError, AttributeError):
        raise OutputError(
            f"--format dcp and pt (format=) need {_PLACES[name]}.{name}, which torch {torch.__version__} has not; use "
            f"torch {_TESTED}, or --format hf."
        ) from None
