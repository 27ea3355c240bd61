"""The options of an output of weights."""

from dataclasses import dataclass

import torch

from twa_scale.base.names import nearest
from twa_scale.errors import ConfigError

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


@dataclass(frozen=True, kw_only=True)
class OutputOptions:
    """How weights are written."""

    dtype: torch.dtype | None = None
    """The dtype of all floating point tensors. By default each has the widest of the candidates, and differences are
    reported."""
    max_shard_size: str | int = "5GB"
    """The largest number of bytes of tensor data in a file; see `CarriedFiles.shard_size`."""
    form: str = "hf"
    """The name of the format; see `output_format`."""
    overwrite: bool = False
    """Whether an earlier output is replaced."""


def parse_dtype(name: str | None) -> torch.dtype | None:
    """Return the floating point type called `name`, or None if `name` is None.

    Raises:
        ConfigError: the name is unknown.
    """
    if name is not None and name not in _DTYPES:
        raise ConfigError(f"dtype: {name!r} is not one of {', '.join(_DTYPES)}{nearest(name, _DTYPES) or '.'}")
    return _DTYPES[name] if name else None
