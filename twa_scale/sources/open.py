"""Finding candidates, opening each as what it is, and checking that they are alike."""

import glob
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from twa_scale.errors import CandidateError
from twa_scale.sources.alike import check_alike
from twa_scale.sources.dcp import METADATA, open_dcp
from twa_scale.sources.dcp_safetensors import is_rank_shard, open_dcp_safetensors
from twa_scale.sources.deepspeed import is_deepspeed, open_deepspeed
from twa_scale.sources.memory import MemoryCandidate
from twa_scale.sources.protocol import Candidate
from twa_scale.sources.safetensors import SafetensorsCandidate
from twa_scale.sources.sharded import ShardedCandidate
from twa_scale.sources.torch_file import TorchFileCandidate

Spec = str | Path | Sequence[str | Path] | Sequence[Mapping[str, torch.Tensor]]

_WEIGHTS = (
    "model.safetensors.index.json",
    "model.safetensors",
    "pytorch_model.bin.index.json",
    "pytorch_model.bin",
)
_TORCH_SUFFIXES = (".pt", ".pth", ".bin")


def open_candidates(spec: Spec, minimum: int = 2) -> list[Candidate]:
    """Open the candidates that `spec` names, and check that they hold the same tensors.

    Args:
        spec: a glob (its matches in natural order: step-2 before step-10), a list of paths and globs in
            training order, or a list of state dicts. A path is a .safetensors, .pt, .pth or .bin file, a
            Hugging Face index, a directory that holds one of these, or a checkpoint folder of DeepSpeed or
            torch.distributed.checkpoint.
        minimum: the fewest candidates that make sense.

    Raises:
        CandidateError: nothing found, something that is no candidate, a damaged file, or candidates that
            differ in names, shapes or kinds of number. Different floating point types are fine.
    """
    items = [spec] if isinstance(spec, str | Path) else list(spec)
    sources: list[Path | Mapping[str, torch.Tensor]] = []
    for item in items:
        sources += [item] if isinstance(item, Mapping) else _find(item)
    if len(sources) < minimum:
        raise CandidateError(_too_few(items, sources, minimum))
    candidates: list[Candidate] = []
    try:
        for i, source in enumerate(sources):
            candidates.append(
                MemoryCandidate(source, f"state dict {i}") if isinstance(source, Mapping) else _open(source)
            )
        check_alike(candidates)
    except BaseException:
        for candidate in candidates:
            candidate.close()
        raise
    return candidates


def _find(item: str | Path) -> list[Path]:
    """Return the path itself, or what it matches as a glob, in natural order."""
    path = Path(item).expanduser()
    if path.exists():
        return [path]
    pattern = str(path)
    if not glob.has_magic(pattern):
        raise CandidateError(f"{pattern}: there is no such file or directory, seen from {Path.cwd()}.")
    matches = glob.glob(pattern, recursive=True)  # noqa: PTH207 - Path.glob takes no absolute pattern
    found = [Path(match) for match in matches if not _hidden(match, pattern)]
    if not found:
        raise CandidateError(
            f"candidates {pattern!r}: the pattern matches nothing, seen from {Path.cwd()}. It must match at "
            "least one file or directory of weights."
        )
    strange = next((match for match in found if not match.is_dir() and not _is_weights(match)), None)
    if strange:
        raise CandidateError(
            f"candidates {pattern!r}: the pattern also matches {str(strange)!r}, which holds no weights, "
            f"seen from {Path.cwd()}. Narrow the pattern, for instance to 'step-*' or '*.safetensors'."
        )
    return sorted(found, key=_natural)


def _hidden(match: str, pattern: str) -> bool:
    """Whether a wildcard matched an output that a writer has not finished."""
    literal = next(i for i, part in enumerate(Path(pattern).parts) if glob.has_magic(part))
    return any(part.startswith(".") or ".tmp-" in part for part in Path(match).parts[literal:])


def _natural(path: Path) -> list[tuple[int, int, str]]:
    """Order numbers by value, the rest as text; separators come first, so that parents stay together."""
    pieces = re.split(r"(\d+)", str(path).replace("/", "\0"))
    return [(0, int(piece), piece) if piece.isdigit() else (1, 0, piece) for piece in pieces if piece]


def _is_weights(path: Path) -> bool:
    return path.suffix in (".safetensors", *_TORCH_SUFFIXES) or path.name.endswith(".index.json")


def _open(path: Path) -> Candidate:
    if path.is_dir():
        return _open_directory(path)
    if is_rank_shard(path):
        raise CandidateError(f"{path}: holds one rank's part of each tensor. Give the directory, {path.parent}.")
    return _open_file(path, path.parent if path.name in _WEIGHTS else None, str(path))


def _open_directory(directory: Path) -> Candidate:
    if file := _weights_in(directory):
        return _open_file(file, directory, str(directory))
    if is_deepspeed(directory):
        return open_deepspeed(directory)
    if (directory / METADATA).is_file():
        return open_dcp(directory)
    files = _safetensors_in(directory)
    if files and all(map(is_rank_shard, files)):
        return open_dcp_safetensors(files, directory)
    several = f", but {len(files)} *.safetensors files without an index" if files else ""
    raise CandidateError(
        f"{directory}: is no candidate: it holds none of {', '.join(_WEIGHTS)}, no single *.safetensors "
        f"file{several}, and is no checkpoint folder of DeepSpeed (*_model_states.pt, latest) or "
        f"torch.distributed.checkpoint ({METADATA}). Name the file itself, leave the directory out, or, if its "
        f"subdirectories are the candidates, write '{directory}/*'."
    )


def _open_file(path: Path, directory: Path | None, label: str) -> Candidate:
    if path.name.endswith(".index.json"):
        return ShardedCandidate(path, lambda file: _open_file(file, None, str(file)), label)
    if path.suffix == ".safetensors":
        return SafetensorsCandidate(path, directory, label)
    if path.suffix in _TORCH_SUFFIXES:
        return TorchFileCandidate(path, directory, label)
    raise CandidateError(
        f"{path}: is no file of weights; a candidate is a .safetensors, .pt, .pth or .bin file, a Hugging "
        "Face index (*.index.json), or a directory that holds one."
    )


def _weights_in(directory: Path) -> Path | None:
    for name in _WEIGHTS[:2]:
        if (directory / name).exists():
            return directory / name
    files = _safetensors_in(directory)
    if len(files) == 1 and not is_rank_shard(files[0]):
        return files[0]
    return next((directory / name for name in _WEIGHTS[2:] if (directory / name).exists()), None)


def _safetensors_in(directory: Path) -> list[Path]:
    return sorted(file for file in directory.glob("*.safetensors") if not file.name.startswith("."))


def _too_few(items: Sequence[object], sources: Sequence[object], minimum: int) -> str:
    if not items:
        return f"candidates: the list is empty; give {minimum} or more paths, globs or state dicts."
    only = f" ({sources[0]})" if isinstance(sources[0], Path) else ""
    return (
        f"candidates: found {len(sources)}{only}, but an average needs at least {minimum}. Widen the "
        f"pattern, or save candidates more often while training (twa_scale.Snapshots)."
    )
