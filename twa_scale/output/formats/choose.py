"""The choice of the format of an output."""

from collections.abc import Callable, Sequence
from pathlib import Path

from twa_scale.base.inputs import named_errors
from twa_scale.base.names import nearest
from twa_scale.base.notices import notice
from twa_scale.candidates import Candidate
from twa_scale.candidates.adapters import ranks_of
from twa_scale.candidates.carry_over import BASE, CarriedFiles
from twa_scale.candidates.directory import INDEX, is_torch
from twa_scale.candidates.formats.dcp import files_in_dcp
from twa_scale.candidates.formats.deepspeed import files_in_deepspeed, shapes_in_deepspeed
from twa_scale.candidates.formats.file_handles import File
from twa_scale.candidates.formats.origin import Origin, origin_of
from twa_scale.candidates.formats.safetensors import Entry, read_header
from twa_scale.candidates.formats.sharded import weight_map
from twa_scale.candidates.steps import step_of
from twa_scale.errors import ConfigError, OutputError
from twa_scale.output.formats.dcp import DcpFormat
from twa_scale.output.formats.format import OutputFormat
from twa_scale.output.formats.other_copies import check_other_copies, other_tensors
from twa_scale.output.formats.safetensors import SafetensorsFormat, SameSafetensorsFormat
from twa_scale.output.formats.same import SameFormat
from twa_scale.output.formats.same_deepspeed import SameDeepSpeedFormat
from twa_scale.output.formats.state_files import state_files
from twa_scale.output.formats.torch_file import TorchFormat

FORMATS = ("same", "hf", "dcp", "pt")


def output_format(
    name: str, candidates: Sequence[Candidate], carried: CarriedFiles, notify: Callable[[str], None] = notice
) -> OutputFormat:
    """Return the format of an output that is called `name`.

    Args:
        name: "hf" (safetensors), "pt", "dcp", or "same" for that of the last candidate, with the state of the training.
        candidates: the candidates; names and nesting are those of the last one.
        carried: the properties of the candidates that the output keeps.
        notify: called with each notice for the user.

    Raises:
        ConfigError: the format is unknown.
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
        chosen = _same_format(last, origin, carried, notify)
    notify(_state_notice([candidate.label for candidate in candidates]))
    return chosen


def _same_format(last: Candidate, origin: Origin, carried: CarriedFiles, notify: Callable[[str], None]) -> OutputFormat:
    root = _root(last, origin)
    if ranks_of(last):
        raise OutputError(
            f"{last.label}: the average of products has other factors than the adapter, and the state of the training, "
            "which --format same (format='same') keeps, does not fit them. Choose hf, dcp or pt, or --space factors."
        )
    if origin.written_as == "deepspeed":
        return _same_deepspeed(last, origin, root, carried, notify)
    files = _weight_files(last, origin)
    is_directory = Path(last.label).is_dir()
    extra_files = state_files(root, files, notify, code=carried.code) if is_directory else []
    own_shapes = {path: other_tensors(path, keys.values()) for path, keys in origin.keys.items()}
    check_other_copies(last, origin, own_shapes, extra_files, notify)
    if origin.written_as == "hf":
        index = _index(last)
        return SameSafetensorsFormat(_entries(files), None if index else last.file_name, extra_files)
    if (index := _index(last)) and origin.written_as == "pt":
        extra_files.append((index.name, index))
    return SameFormat(origin, root, extra_files)


def _same_deepspeed(
    last: Candidate, origin: Origin, root: Path, carried: CarriedFiles, notify: Callable[[str], None]
) -> OutputFormat:
    files = files_in_deepspeed(root)
    extra_files = state_files(root, files, notify, code=carried.code, of_deepspeed=True)
    own_shapes = shapes_in_deepspeed(root)
    added = [
        (str(path.relative_to(root)), path) for path in files if path not in own_shapes
    ]  # added to the folder by a script
    check_other_copies(last, origin, own_shapes, [*extra_files, *added], notify)
    return SameDeepSpeedFormat(origin, root, extra_files)


def _root(last: Candidate, origin: Origin) -> Path:
    """Return the directory of a candidate, which becomes that of the output.

    Raises:
        OutputError: no output has the format of the candidate, or its files are missing or outside of its directory.
    """
    if origin.written_as is None:
        raise OutputError(
            f"{last.label}: is {origin.description}, which --format same (format='same') does not write. Choose hf, "
            "dcp or pt."
        )
    label = Path(last.label)
    if not label.exists():
        raise OutputError(
            f"{last.label}: is not there any more, and --format same (format='same') copies its files. Choose hf, dcp "
            "or pt."
        )
    root = label if label.is_dir() else label.parent
    if other := next((path for path in origin.keys if not path.is_relative_to(root)), None):
        raise OutputError(
            f"{last.label}: its weights are in {other}, which is not below it, and --format same (format='same') "
            "copies a directory. Name the directory of the weights, or choose hf, dcp or pt."
        )
    return root


def _state_notice(labels: Sequence[str]) -> str:
    """Return a notice with the candidate whose state of the training is copied."""
    text = f"--format same (format='same'): the state of the training is that of {labels[-1]}, the last candidate"
    steps = {label: step for label in labels if (step := step_of(Path(label))) is not None}
    furthest = max(steps, key=lambda label: steps[label], default=labels[-1])
    if labels[-1] not in steps or steps[furthest] == steps[labels[-1]]:
        return f"{text}."
    return (
        f"{text}, though {furthest} is of a later step. Give the candidates in the order of the training (a pattern in "
        "quotes is put in that order) if that is not meant."
    )


def _entries(files: Sequence[Path]) -> dict[str, Entry]:
    """Return the entry of each tensor in the headers of safetensors files."""
    result: dict[str, Entry] = {}
    for path in files:
        if not path.name.endswith(INDEX):
            file = File(path)
            result |= read_header(file)[0]
            file.close()
    return result


def _weight_files(last: Candidate, origin: Origin) -> list[Path]:
    """Return the files that hold the weights of a candidate, and their index."""
    files = [file for path in origin.keys for file in (files_in_dcp(path) if path.is_dir() else [path])]
    if index := _index(last):
        files += [index, *(index.parent / name for name in set(weight_map(index).values()))]
    elif last.file_name:
        files.append((last.directory or Path(last.label).parent) / last.file_name)
    return files


def _index(last: Candidate) -> Path | None:
    if last.file_name and last.file_name.endswith(INDEX) and last.directory:
        return last.directory / last.file_name
    return None


def _file_name(last: Candidate, base: str) -> str:
    """Return the name of a file of torch.save: that of the last candidate, or the usual name for loaders."""
    if last.file_name and is_torch(last.file_name):
        return last.file_name
    return f"{'pytorch_model' if base == BASE else base}.bin"


def _folder(last: Candidate, origin: Origin) -> str:
    """Return the folder of DCP files in an output, which is that of the last candidate in its directory."""
    root = Path(last.label)
    folders = [path for path in origin.keys if path.is_dir() and path != root and path.is_relative_to(root)]
    return str(folders[0].relative_to(root)) if folders else "."
