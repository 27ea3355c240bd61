"""Candidates at URLs. Weights are read by ranges, and the small files next to them are downloaded."""

from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from twa_scale.base.names import quoted
from twa_scale.base.urls import Url
from twa_scale.candidates.candidate import Candidate
from twa_scale.candidates.directory import INDEX, files_in, is_shard, is_weights, weights_in
from twa_scale.candidates.formats.dcp import METADATA
from twa_scale.candidates.proxy import CandidateProxy
from twa_scale.candidates.side_files import MAX_BYTES, MAX_FILES, may_be_carried
from twa_scale.errors import CandidateError

_READ = "Only safetensors are read from URLs, one file or shards with an index: download the candidates"


class _WithSmallFiles(CandidateProxy):
    """A candidate whose small files are in a temporary directory until it is closed."""

    def __init__(self, candidate: Candidate, url: Url) -> None:
        super().__init__(candidate)
        self._temporary = TemporaryDirectory(prefix="twa-scale-")
        self.directory = Path(self._temporary.name) / (url.name or "candidate")
        self.directory.mkdir()

    def close(self) -> None:
        """Close the candidate, and remove its small files."""
        super().close()
        self._temporary.cleanup()


def open_url(url: Url, open_file: Callable[[Url, None, str], Candidate]) -> Candidate:
    """Open the file of weights that a URL names, or the one in the directory that it names.

    Args:
        url: the URL of a file or a directory.
        open_file: opens the file of weights; its last argument is the name of the candidate in messages.

    Raises:
        CandidateError: there is no file of weights, or it has a format that cannot be read from a URL.
    """
    if is_weights(url.name):
        _require_safetensors(url)
        if is_shard(url.name):
            raise CandidateError(f"{url}: holds a part of the tensors. Give its index, or the directory {url.parent}.")
        return open_file(url, None, str(url))
    names = files_in(url)
    file = weights_in(url)
    if file is None:
        raise CandidateError(
            f"{url}: has no safetensors that a library would load: {_described(url, names)}. {_READ}, and give their "
            "paths."
        )
    _require_safetensors(file)
    candidate = _WithSmallFiles(open_file(file, None, str(url)), url)
    try:
        for name in [name for name in names if may_be_carried(name)][:MAX_FILES]:
            assert candidate.directory is not None
            (candidate.directory / name).write_bytes((url / name).read_bounded(MAX_BYTES))
    except BaseException:
        candidate.close()
        raise
    return candidate


def _described(url: Url, names: Sequence[str]) -> str:
    """Return a text about the content of a directory without safetensors."""
    if (url / METADATA).is_file():
        return "it is a checkpoint of torch.distributed.checkpoint"
    if any(name == "latest" or name.endswith("_model_states.pt") for name in names):
        return "it is a checkpoint of DeepSpeed"
    return f"it holds {quoted(names)}" if names else "it holds no files, or is not there"


def _require_safetensors(file: Url) -> None:
    if not file.name.lower().removesuffix(INDEX).endswith(".safetensors"):
        raise CandidateError(f"{file}: is not a safetensors file. {_READ}, or convert them.")
