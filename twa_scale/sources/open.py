"""Opening candidates, each as what it is, and checking that they are alike."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from twa_scale.errors import CandidateError
from twa_scale.sources.alike import check_alike
from twa_scale.sources.dcp import METADATA, open_dcp
from twa_scale.sources.dcp_safetensors import is_rank_shard, open_dcp_safetensors
from twa_scale.sources.deepspeed import is_deepspeed, open_deepspeed
from twa_scale.sources.directory import INDEX, LOADERS, TORCH_SUFFIXES, is_shard, refusal, weights_in
from twa_scale.sources.find import Source, Spec, find_sources
from twa_scale.sources.memory import MemoryCandidate
from twa_scale.sources.protocol import Candidate
from twa_scale.sources.safetensors import SafetensorsCandidate
from twa_scale.sources.sharded import ShardedCandidate
from twa_scale.sources.torch_file import TorchFileCandidate


def open_candidates(spec: Spec, minimum: int = 2) -> list[Candidate]:
    """Open the candidates that `spec` names, and check that they hold the same tensors.

    Args:
        spec: a glob (its matches in natural order: step-2 before step-10), a list of paths and globs in
            training order, or a list of state dicts. A path is a .safetensors, .pt, .pth, .bin or .ckpt file, a
            Hugging Face index, a directory that holds one of these, or a checkpoint folder of DeepSpeed or
            torch.distributed.checkpoint.
        minimum: the fewest candidates that make sense.

    Raises:
        CandidateError: nothing found, something that is no candidate, a damaged file, or candidates that
            differ in names, shapes or kinds of number. Different floating point types are fine.
    """
    return open_sources(find_sources(spec, minimum))


def open_sources(sources: Sequence[Source]) -> list[Candidate]:
    """Open what `find_sources` has found, and check that all hold the same tensors.

    Raises:
        CandidateError: see `open_candidates`.
    """
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


def _open(path: Path) -> Candidate:
    if path.is_dir():
        return _open_directory(path)
    if is_rank_shard(path):
        raise CandidateError(f"{path}: holds one rank's part of each tensor. Give the directory, {path.parent}.")
    if is_shard(path.name):
        raise CandidateError(f"{path}: holds a part of the tensors. Give its index, or the directory {path.parent}.")
    of_its_own = any(path.name in order for order in LOADERS.values())
    return _open_file(path, path.parent if of_its_own else None, str(path))


def _open_directory(directory: Path) -> Candidate:
    if file := weights_in(directory):
        return _open_file(file, directory, str(directory))
    if is_deepspeed(directory):
        return open_deepspeed(directory)
    if (directory / METADATA).is_file():
        return open_dcp(directory)
    files = sorted(file for file in directory.glob("*.safetensors") if not file.name.startswith("."))
    if files and all(map(is_rank_shard, files)):
        return open_dcp_safetensors(files, directory)
    raise refusal(directory)


def _open_file(path: Path, directory: Path | None, label: str) -> Candidate:
    if path.name.endswith(INDEX):
        return ShardedCandidate(path, lambda file: _open_file(file, None, str(file)), label)
    if path.suffix == ".safetensors":
        return SafetensorsCandidate(path, directory, label)
    if path.suffix in TORCH_SUFFIXES:
        return TorchFileCandidate(path, directory, label)
    raise CandidateError(
        f"{path}: is no file of weights; a candidate is a .safetensors, .pt, .pth, .bin or .ckpt file, a Hugging "
        "Face index (*.index.json), or a directory that holds one."
    )
