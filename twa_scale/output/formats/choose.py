"""The choice of the format of an output."""

import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from twa_scale.base.inputs import named_errors
from twa_scale.base.names import nearest
from twa_scale.base.notices import notice
from twa_scale.candidates import Candidate
from twa_scale.candidates.carry_over import BASE, CarriedFiles
from twa_scale.candidates.directory import INDEX, is_torch
from twa_scale.candidates.formats.dcp import files_in_dcp, keys_in_dcp
from twa_scale.candidates.formats.origin import Keys, Origin, origin_of
from twa_scale.candidates.formats.sharded import weight_map
from twa_scale.candidates.formats.torch_file import tensors_in
from twa_scale.candidates.weights_key import OF_LIGHTNING
from twa_scale.errors import ConfigError, OutputError
from twa_scale.output.formats.dcp import DcpFormat
from twa_scale.output.formats.format import OutputFormat
from twa_scale.output.formats.safetensors import SafetensorsFormat
from twa_scale.output.formats.same import SameFormat
from twa_scale.output.formats.state_files import state_files
from twa_scale.output.formats.torch_file import TorchFormat

FORMATS = ("same", "hf", "dcp", "pt")
_MASTER = re.compile(
    r"fp32_from_fp16\w*|fp32_param|master_(weights|params)|single_partition_of_fp32_groups|fp32_flat_groups"
)


def output_format(
    name: str, candidates: Sequence[Candidate], carried: CarriedFiles, tell: Callable[[str], None] = notice
) -> OutputFormat:
    """Return the format of an output that is called `name`.

    Args:
        name: "hf" (safetensors), "pt", "dcp", or "same" for that of the last candidate, with the state of the training.
        candidates: the candidates; names and nesting are those of the last one.
        carried: what the output takes from the candidates.
        tell: called with one line for each reason why files are left out.

    Raises:
        ConfigError: there is no such format.
        OutputError: no output can have the format of the last candidate.
    """
    if name not in FORMATS:
        raise ConfigError(f"format: {name!r} is not one of {', '.join(FORMATS)}{nearest(name, FORMATS) or '.'}")
    last = candidates[-1]
    origin = origin_of(last)
    if name == "hf":
        return SafetensorsFormat()
    if name == "pt":
        return TorchFormat(_file_name(last, carried.base), origin.nesting)
    if name == "dcp":
        return DcpFormat(_folder(last, origin), origin.nesting)
    with named_errors(OutputError, "--format same (format='same') copies what is in the directory."):
        return _same(last, origin, carried, tell)


def _same(last: Candidate, origin: Origin, carried: CarriedFiles, tell: Callable[[str], None]) -> OutputFormat:
    if origin.written_as is None:
        raise OutputError(
            f"{last.label}: is {origin.what}, which --format same (format='same') does not write. Choose hf, dcp or pt."
        )
    root = Path(last.label)
    if not root.exists():
        raise OutputError(
            f"{last.label}: is not there any more, and --format same (format='same') copies its files. Choose hf, dcp "
            "or pt."
        )
    if master := _master_copy(origin):
        raise OutputError(
            f"{last.label}: holds {master!r}, the optimizer's copy of weights, from which training would resume, and "
            "not from the average. Choose --format hf, dcp or pt (format=), and start with a new optimizer."
        )
    if origin.nesting != (OF_LIGHTNING,) and any(keys[0] == OF_LIGHTNING for keys in _all_keys(origin)):
        tell(
            f"{last.label}: Lightning's WeightAveraging resumes from {OF_LIGHTNING!r}, which stays that of the last "
            f"candidate. Set `weights_key: {OF_LIGHTNING}` (--weights-key) to average that."
        )
    beside = []
    if root.is_dir():
        beside = state_files(root, _weight_files(last, origin), tell, code=carried.code)
    if origin.written_as == "hf":
        return SafetensorsFormat(beside, of_last=True)
    if (index := _index(last)) and origin.written_as == "pt":
        beside.append((index.name, index))
    return SameFormat(origin, root if root.is_dir() else next(iter(origin.keys)).parent, beside)


def _master_copy(origin: Origin) -> str | None:
    """Return the name of a tensor that is the optimizer's copy of weights; None if there is none."""
    names = map(".".join, _all_keys(origin))
    return next((name for name in names if any(map(_MASTER.fullmatch, name.split(".")))), None)


def _all_keys(origin: Origin) -> Iterator[Keys]:
    """Yield the paths of keys of all tensors in the files of the weights."""
    for path in origin.keys:
        yield from keys_in_dcp(path) if path.is_dir() else tensors_in(path)


def _weight_files(last: Candidate, origin: Origin) -> list[Path]:
    """Return the files that hold the weights of a candidate, and their index."""
    files = [file for path in origin.keys for file in (files_in_dcp(path) if path.is_dir() else [path])]
    if index := _index(last):
        files += [index, *(index.parent / name for name in set(weight_map(index).values()))]
    elif last.file_name and last.directory:
        files.append(last.directory / last.file_name)
    return files


def _index(last: Candidate) -> Path | None:
    if last.file_name and last.file_name.endswith(INDEX) and last.directory:
        return last.directory / last.file_name
    return None


def _file_name(last: Candidate, base: str) -> str:
    """Return the name of a file of torch.save: that of the last candidate, or what loaders look for."""
    if last.file_name and is_torch(last.file_name):
        return last.file_name
    return f"{'pytorch_model' if base == BASE else base}.bin"


def _folder(last: Candidate, origin: Origin) -> str:
    """Return the folder of DCP files in an output: that which the last candidate has in its directory."""
    root = Path(last.label)
    inside = [path for path in origin.keys if path.is_dir() and path != root and path.is_relative_to(root)]
    return str(inside[0].relative_to(root)) if inside else "."
