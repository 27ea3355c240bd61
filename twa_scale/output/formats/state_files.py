"""The files of a candidate's directory, other than the weights, from which training resumes."""

from collections.abc import Callable, Collection, Iterator
from pathlib import Path

from twa_scale.base.names import quoted
from twa_scale.candidates.directory import LOADERS, is_shard, is_variant
from twa_scale.candidates.formats.dcp import METADATA
from twa_scale.candidates.formats.dcp_safetensors import is_rank_shard
from twa_scale.candidates.formats.deepspeed import is_deepspeed
from twa_scale.candidates.side_files import NO_FOLDER, is_code, root_of_links
from twa_scale.candidates.steps import has_step_number
from twa_scale.errors import OutputError
from twa_scale.output.provenance import PROVENANCE

_LOADED = {name for order in LOADERS.values() for name in order}


def state_files(
    root: Path,
    weights: Collection[Path],
    notify: Callable[[str], None],
    *,
    code: bool = False,
    of_deepspeed: bool = False,
) -> list[tuple[str, Path]]:
    """Return the files of a directory that an output copies unchanged, by their path in it.

    These are all but the weights, other files that hold the same weights, checkpoints of other steps, code, hidden
    files, and links that lead out of the directory.

    Args:
        root: the directory of a candidate.
        weights: the files of its weights.
        notify: called with one line for each reason why files are left out.
        code: whether code is copied too.
        of_deepspeed: whether the weights are those of a checkpoint of DeepSpeed.

    Raises:
        OutputError: the directory also has a checkpoint of DeepSpeed, which contains the weights.
    """
    if is_deepspeed(root) and not of_deepspeed:
        raise OutputError(
            f"{root}: holds a checkpoint of DeepSpeed, from which training would resume with the weights in it, and "
            "not with the average. Average the folders that `latest` names in each directory with --format same "
            "(format='same'), and put the result in its place in a copy of the last one; or choose --format hf "
            "(format='hf'), and load the average with from_pretrained."
        )
    scan = _FileScan(root, {path.resolve() for path in weights}, code)
    files = [(str(path.relative_to(root)), path) for path in scan.files(root)]
    for reason, names in scan.left_out.items():
        notify(f"{root}: left out of the output: {quoted(sorted(names))} ({reason}).")
    return files


class _FileScan:
    def __init__(self, root: Path, weights: Collection[Path], code: bool) -> None:
        self._root = root
        self._weights = weights
        self._code = code
        self._with_weights = {path.parent for path in weights}
        self._names = {path.name for path in weights}
        self._weight_files = root_of_links(root.resolve())
        self.left_out: dict[str, list[str]] = {}

    def files(self, folder: Path) -> Iterator[Path]:
        for path in sorted(folder.iterdir()):
            if path.is_dir():
                if not path.name.startswith(".") and path.name not in NO_FOLDER and self._enter(path):
                    yield from self.files(path)
            elif self._wanted(path):
                yield path

    def _enter(self, folder: Path) -> bool:
        if folder.resolve() in self._with_weights:
            return True
        if folder.is_symlink():
            return self._leave_out(folder, "a link to a folder")
        if has_step_number(folder):
            return self._leave_out(folder, "a separate checkpoint")
        if any(map(is_rank_shard, folder.iterdir())):  # torchtitan leaves it next to the complete files
            return self._leave_out(folder, "the weights before the average, in other files")
        if (folder / PROVENANCE).is_file():
            return self._leave_out(folder, "weights that twa_scale has written")
        return True

    def _wanted(self, path: Path) -> bool:
        if path.name == PROVENANCE or (path.name.startswith(".") and path.name != METADATA):
            return False
        if not path.is_file() or not path.resolve().is_relative_to(self._weight_files):
            return self._leave_out(path, "a link that leads out of the directory, or not a regular file")
        if path.resolve() in self._weights:
            return False
        if is_code(path.name) and not self._code:  # `side_files` reports it.
            return False
        if path.parent == self._root and self._holds_the_same(path.name):
            return self._leave_out(path, "the weights before the average, in other files")
        return True

    def _holds_the_same(self, name: str) -> bool:
        return name in _LOADED or is_shard(name) or any(is_variant(name, own_name) for own_name in self._names)

    def _leave_out(self, path: Path, reason: str) -> bool:
        self.left_out.setdefault(reason, []).append(str(path.relative_to(self._root)))
        return False
