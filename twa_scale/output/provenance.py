"""The provenance of an output: the version, the candidates and settings, in headers and in twa_scale.json."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from twa_scale.candidates.carry_over import CarriedFiles
from twa_scale.output.formats.format import OutputFormat
from twa_scale.output.model_card import with_card
from twa_scale.output.options import OutputOptions
from twa_scale.version import __version__

PROVENANCE = "twa_scale.json"
"""The file of an output that holds its provenance."""
PROVENANCE_KEY = "twa_scale"
"""The key of the provenance in the metadata of a header. It identifies files that this program wrote."""
SIGNATURES = "weights"
"""The key in twa_scale.json of the signatures of files that cannot hold a provenance, by name: weights and state."""
_MAX_HEADER_BYTES = 1 << 16  # of provenance in a header, which readers parse first
_SHORT_KEYS = ("version", "wrote", "step", "candidates")


def provenance(wrote: str, candidates: Sequence[str], **more: object) -> dict[str, Any]:
    """Return the provenance of an output.

    Args:
        wrote: what was written, such as "an average".
        candidates: the labels of the candidates.
        more: further entries, such as the step or the coefficients.
    """
    # Outputs are UTF-8, which has no form of the bytes of a path that are not.
    labels = [label.encode("utf-8", "backslashreplace").decode() for label in candidates]
    return {"version": __version__, "wrote": wrote, "candidates": labels, **more}


def rows_provenance(corrected: bool) -> dict[str, Any]:
    """Return the entry that says that `coefficients` are those of groups, and rows differ from them."""
    note = "single rows have corrections, which the state of the run holds: coefficients are without them"
    return {"rows": note} if corrected else {}


def writing_options(
    carried: CarriedFiles,
    origin: Mapping[str, Any],
    options: OutputOptions,
    form: OutputFormat,
) -> dict[str, Any]:
    """Return the keyword arguments of `writing`.

    Args:
        carried: the files and metadata that are copied from the candidates.
        origin: the `provenance`.
        options: dtype, sizes and whether an earlier output is replaced. The size of one file is ignored if the loaders
            of this format read only one.
        form: the format of the weight files.
    """
    if form.keeps_dtypes:
        carried = replace(carried, wider=None)
    files = carried.files_for(options.dtype)
    return {
        "form": form,
        "overwrite": options.overwrite,
        "max_shard_size": carried.shard_size(options.max_shard_size),
        "base": carried.base_for(options.dtype),
        **with_provenance(origin, with_card(files, origin), carried.metadata),
    }


def with_provenance(
    origin: Mapping[str, Any],
    files: Mapping[str, bytes | Path],
    metadata: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Return the `files` and `metadata` of an output with its provenance. Only such an output is ever overwritten.

    Args:
        origin: the `provenance`.
        files: further files to write next to the weights.
        metadata: further metadata of the headers.
    """
    return {
        "metadata": _in_header(origin, metadata or {}),
        "files": {**files, PROVENANCE: _as_file(origin, files)},
    }


def with_signatures(files: Mapping[str, bytes | Path], signatures: Mapping[str, str]) -> dict[str, bytes | Path]:
    """Return the files with the signatures of other files in the provenance."""
    origin = files.get(PROVENANCE)
    if not isinstance(origin, bytes):
        return dict(files)
    signed = {**json.loads(origin), SIGNATURES: dict(signatures)}
    return {**files, PROVENANCE: (json.dumps(signed, indent=2) + "\n").encode()}


def _in_header(origin: Mapping[str, Any], metadata: Mapping[str, str]) -> dict[str, str]:
    """Return the metadata of a safetensors header: the candidate's `metadata`, and `origin` under "twa_scale".

    A long provenance is shortened to a few entries and the name of the file that holds all of it.
    """
    text = json.dumps(origin)
    if len(text) > _MAX_HEADER_BYTES:
        text = json.dumps({key: origin[key] for key in _SHORT_KEYS if key in origin} | {"more": PROVENANCE})
    if len(text) > _MAX_HEADER_BYTES:
        text = json.dumps({"version": origin["version"], "wrote": origin["wrote"], "more": PROVENANCE})
    return {**metadata, PROVENANCE_KEY: text}


def _as_file(origin: Mapping[str, Any], files: Iterable[str]) -> bytes:
    """Return the content of twa_scale.json: `origin`, and the names of the `files` next to the weights."""
    return (json.dumps({**origin, "files": sorted(files)}, indent=2) + "\n").encode()
