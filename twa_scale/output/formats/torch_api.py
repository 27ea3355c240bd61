"""The private API of torch that is used. It is checked before it is used."""

from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from twa_scale.errors import OutputError
from twa_scale.version import TESTED_TORCH

_PROBE_BYTES = 1 << 16
NUMBERS_FILE = 4096
"""The maximum number of bytes that an archive of torch.save has for each tensor in addition to its values."""
_PLACES = {
    "FakeTensorMode": "torch._subclasses.fake_tensor",
    "skip_data": "torch.serialization",
    "_StorageInfo": "torch.distributed.checkpoint.filesystem",
}


def without_values(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Return a tensor without memory, for `save_without_values`."""
    with _private_attribute("FakeTensorMode")():
        return torch.empty(shape, dtype=dtype)


def save_without_values(content: Any, path: Path, nbytes: int) -> None:
    """Write the file that torch.save writes for `content`, with holes for the values of `without_values`.

    Args:
        content: the value to save.
        path: the file.
        nbytes: the size of all tensors in bytes.

    Raises:
        OSError: the disk is full or fails.
    """
    try:
        with _private_attribute("skip_data")(materialize_fake_tensors=True):
            torch.save(content, path)
        if path.stat().st_size < nbytes:  # torch 2.6 raises no error
            raise RuntimeError("the file is truncated")
    except RuntimeError as error:  # torch does not report the failed system call: try the calls
        with path.open("wb", buffering=0) as file:
            file.write(bytes(_PROBE_BYTES))
            file.truncate(nbytes)
        raise OSError(f"torch.save failed ({str(error).splitlines()[0]})") from error


def storage_info(file: str, offset: int, length: int) -> Any:
    """Return the object with the position of a chunk in the metadata of DCP."""
    return _private_attribute("_StorageInfo")(file, offset, length)


def _private_attribute(name: str) -> Any:
    try:
        return getattr(import_module(_PLACES[name]), name)
    except (ImportError, AttributeError):
        raise OutputError(
            f"--format dcp and pt (format=) need {_PLACES[name]}.{name}, which torch {torch.__version__} does not "
            f"have; use torch {TESTED_TORCH}, or --format hf."
        ) from None
