"""Open candidates of any format, and check that they have the same tensors."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from twa_scale.base.inputs import named_errors
from twa_scale.base.notices import notice
from twa_scale.base.urls import Url
from twa_scale.candidates.adapters import in_space
from twa_scale.candidates.candidate import Candidate
from twa_scale.candidates.complex_tensors import in_pairs
from twa_scale.candidates.directory import INDEX, LOADERS, is_shard, is_torch, sharded_in, weights_in
from twa_scale.candidates.find import Notify, Source, Spec, find_sources
from twa_scale.candidates.formats.dcp import METADATA, open_dcp
from twa_scale.candidates.formats.dcp_safetensors import is_rank_shard, open_dcp_safetensors
from twa_scale.candidates.formats.deepspeed import is_deepspeed, open_deepspeed
from twa_scale.candidates.formats.rank_files import has_rank_files, is_rank_file, open_rank_files
from twa_scale.candidates.formats.safetensors import SafetensorsCandidate
from twa_scale.candidates.formats.sharded import ShardedCandidate
from twa_scale.candidates.formats.state_dict import MemoryCandidate
from twa_scale.candidates.formats.torch_file import TorchFileCandidate
from twa_scale.candidates.not_found import refusal
from twa_scale.candidates.other_formats import named_format
from twa_scale.candidates.remote import open_url
from twa_scale.candidates.same_tensors import require_same_tensors
from twa_scale.candidates.select import ALL, Wanted, select
from twa_scale.candidates.view import View
from twa_scale.candidates.weights_key import WeightsKey
from twa_scale.candidates.wrapper_names import unwrapped
from twa_scale.config import SelectConfig
from twa_scale.errors import CandidateError


def open_candidates(
    spec: Spec,
    minimum: int = 2,
    wanted: Wanted = ALL,
    notify: Notify = notice,
    select: SelectConfig | None = None,
) -> list[Candidate]:
    """Open the candidates of `spec`, and check that they have the same tensors.

    Args:
        spec: a glob (its matches in natural order: step-2 before step-10), a list of paths and globs in
            training order, or a list of state dicts. A path is a .safetensors, .pt, .pth, .bin or .ckpt file, a
            Hugging Face index, a directory that holds one of these, or a checkpoint folder of DeepSpeed or
            torch.distributed.checkpoint.
        minimum: the smallest number of candidates.
        wanted: the tensors to read.
        notify: called with each line for the user.
        select: the range and the order of the candidates; by default, all as they are found.

    Raises:
        CandidateError: nothing is found, a path is not a candidate, a file is damaged, weights are quantized, or
            candidates differ in names, shapes or kinds of number. Floating point dtypes may differ.
    """
    return open_sources(find_sources(spec, minimum, notify, select), wanted, notify)


def open_sources(sources: Sequence[Source], wanted: Wanted = ALL, notify: Notify = notice) -> list[Candidate]:
    """Open the results of `find_sources`, and check that all have the same tensors; complex ones are read as pairs.

    Raises:
        CandidateError: see `open_candidates`.
    """
    opener = _Opener(WeightsKey(wanted.weights_key, wanted.parameters, wanted.ignore))
    candidates: list[Candidate] = []
    try:
        for i, source in enumerate(sources):
            with named_errors():
                candidates.append(opener.open(source, i))
        _refuse_one_memory(sources, candidates)
        selected, lines = select(candidates, wanted, opener.keys.ignored)
        selected, more = in_space(selected, wanted.space)
        require_same_tensors(selected)
        for line in [*opener.keys.notices(), *lines, *more]:
            notify(line)
    except BaseException:
        for candidate in candidates:
            candidate.close()
        raise
    return [in_pairs(candidate) for candidate in selected]


def _refuse_one_memory(sources: Sequence[Source], candidates: Sequence[Candidate]) -> None:
    """Refuse state dicts that share their memory, such as those of one model that were not copied.

    Raises:
        CandidateError: names the state dicts and the fix.
    """
    first_of: dict[object, int] = {}
    for i, candidate in enumerate(candidates):
        if isinstance(sources[i], Mapping) and isinstance(candidate, MemoryCandidate):
            keys = candidate.memory_keys
            first = first_of.setdefault(frozenset(keys.items()), i)
            if sources[first] is not sources[i]:
                raise CandidateError(
                    f"{candidate.label}: its tensors ({next(iter(keys))!r}, ..) are in the same memory as those of "
                    f"state dict {first}, so both hold the same values: state_dict() is live. Keep copies: "
                    "{name: tensor.clone() for name, tensor in model.state_dict().items()}."
                )


class _Opener:
    """Opens a candidate with the reader of its format."""

    def __init__(self, keys: WeightsKey) -> None:
        self.keys = keys

    def open(self, source: Source, number: int) -> Candidate:
        """Open a path, or the state dict of this number in the list."""
        if isinstance(source, Mapping):
            return MemoryCandidate(source, f"state dict {number}", None, self.keys)
        if isinstance(source, Url):
            return open_url(source, self._file)
        if source.is_dir():
            return self._directory(source)
        if is_rank_shard(source) or is_rank_file(source):
            raise CandidateError(
                f"{source}: holds one rank's part of each tensor. Give the directory, {source.parent}."
            )
        if is_shard(source.name):
            raise CandidateError(
                f"{source}: holds a part of the tensors. Give its index, or the directory {source.parent}."
            )
        has_loader_name = any(source.name in order for order in LOADERS.values())
        return self._file(source, source.parent if has_loader_name else None, str(source))

    def _directory(self, directory: Path) -> Candidate:
        if file := weights_in(directory):
            return self._file(file, directory, str(directory))
        if is_deepspeed(directory):
            return self._under_key(open_deepspeed(directory))
        if (directory / METADATA).is_file():
            return open_dcp(directory, self.keys)
        if inner := sharded_in(directory):
            if not (inner / METADATA).is_file():
                raise refusal(inner)
            return open_dcp(inner, self.keys, directory)
        if has_rank_files(directory):
            return open_rank_files(directory, self.keys)
        files = sorted(file for file in directory.glob("*.safetensors") if not file.name.startswith("."))
        if files and all(map(is_rank_shard, files)):
            return self._under_key(open_dcp_safetensors(files, directory))
        raise refusal(directory)

    def _file(self, path: Path | Url, directory: Path | None, label: str) -> Candidate:
        if path.name.endswith(INDEX):
            return self._under_key(ShardedCandidate(path, _open_part, label))
        if isinstance(path, Path) and is_torch(path.name):
            return TorchFileCandidate(path, directory, label, self.keys)
        return self._under_key(_safetensors(path, directory, label))

    def _under_key(self, candidate: Candidate) -> Candidate:
        """Return the tensors under the key of `weights_key`, as a prefix of names; all tensors without a key."""
        if self.keys.key is None:
            return candidate
        try:
            chosen = self.keys.choose({(name,): candidate.shape(name) for name in candidate.names()}, candidate.label)
            return View(candidate, {name: chosen[raw][0] for name, raw in unwrapped(chosen, candidate.label).items()})
        except BaseException:
            candidate.close()
            raise


def _open_part(path: Path | Url) -> Candidate:
    """Open a file of an index."""
    if isinstance(path, Path) and is_torch(path.name):
        return TorchFileCandidate(path)
    return _safetensors(path, None, str(path))


def _safetensors(path: Path | Url, directory: Path | None, label: str) -> Candidate:
    if path.suffix.lower() == ".safetensors":
        return SafetensorsCandidate(path, directory, label)
    if format_name := named_format([path]):
        raise CandidateError(f"{path}: {format_name}")
    raise CandidateError(
        f"{path}: is not a file of weights; a candidate is a .safetensors, .pt, .pth, .bin or .ckpt file, a Hugging "
        "Face index (*.index.json), or a directory that holds one."
    )
