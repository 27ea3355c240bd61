"""What an output says of itself, and what it takes over from its candidates, beside the tensors."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from twa_scale.candidates.carry_over import Carried
from twa_scale.version import __version__

PROVENANCE = "twa_scale.json"
"""The file of an output that says where it comes from."""
MARK = "twa_scale"
"""The key of the same in the metadata of a header: what this program wrote is known by it."""
_MOST = 1 << 16  # bytes in the header of each file of weights, which readers parse before anything else
_SHORT = ("version", "wrote", "step", "candidates")


def provenance(wrote: str, candidates: Sequence[str], **more: object) -> dict[str, Any]:
    """Return where an output comes from: the version, what was written, the candidates' labels, and `more`."""
    return {"version": __version__, "wrote": wrote, "candidates": list(candidates), **more}


def writing_options(
    carried: Carried, origin: Mapping[str, Any], dtype: torch.dtype | None, max_shard_size: str | int
) -> dict[str, Any]:
    """Return what `writing` is given beside the tensors.

    Args:
        carried: what is taken over from the candidates.
        origin: the `provenance`.
        dtype: type that floating point tensors are converted to, if any.
        max_shard_size: most bytes of one file; without effect where loaders read only one.
    """
    return {
        "max_shard_size": carried.shard_size(max_shard_size),
        "base": carried.base,
        **marked(origin, carried.files_for(dtype), carried.metadata),
    }


def marked(
    origin: Mapping[str, Any], files: Mapping[str, bytes | Path], metadata: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Return the `files` and `metadata` of an output that says where it comes from; only such a one is overwritten.

    Args:
        origin: the `provenance`.
        files: what else is put beside the weights.
        metadata: what else the headers say.
    """
    return {
        "metadata": _in_header(origin, metadata or {}),
        "files": {**files, PROVENANCE: _as_file(origin, files)},
    }


def _in_header(origin: Mapping[str, Any], own: Mapping[str, str]) -> dict[str, str]:
    """Return the metadata of a safetensors header: the candidate's `own`, and `origin` under "twa_scale".

    Of what would make the header large only the beginning is there, and the name of the file that has it all.
    """
    said = json.dumps(origin)
    if len(said) > _MOST:
        said = json.dumps({key: origin[key] for key in _SHORT if key in origin} | {"more": PROVENANCE})
    if len(said) > _MOST:
        said = json.dumps({"version": origin["version"], "wrote": origin["wrote"], "more": PROVENANCE})
    return {**own, MARK: said}


def _as_file(origin: Mapping[str, Any], files: Mapping[str, object]) -> bytes:
    """Return the content of twa_scale.json: `origin`, and the names of the `files` that were carried over."""
    return (json.dumps({**origin, "files": sorted(files)}, indent=2) + "\n").encode()
