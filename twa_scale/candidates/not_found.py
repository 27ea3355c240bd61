"""The error message for a directory that is not a candidate, with the missing files and a suggestion."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from twa_scale.base.names import quoted
from twa_scale.candidates.adapters import ADAPTER_CONFIG
from twa_scale.candidates.directory import LOADERS, files_in, is_weights, sharded_in, weights_in
from twa_scale.candidates.formats.dcp import METADATA
from twa_scale.candidates.formats.deepspeed import is_deepspeed
from twa_scale.candidates.formats.megatron import other_megatron_format
from twa_scale.candidates.formats.rank_files import has_rank_files
from twa_scale.candidates.other_formats import named_format
from twa_scale.candidates.steps import step_of
from twa_scale.errors import CandidateError

_SHARD = re.compile(r"-\d{5}-of-\d{5}\.safetensors$")
_MAX_SEEN = 1000  # folders that are searched
_MAX_DEPTH = 2  # as deep as the snapshots in a cache of the Hugging Face hub


def refusal(directory: Path) -> CandidateError:
    """Return the error for a directory that is not a candidate."""
    adapters = [path for path in sorted(directory.iterdir())[:_MAX_SEEN] if (path / ADAPTER_CONFIG).is_file()]
    if adapters:
        return CandidateError(
            f"{directory}: is no candidate, but its subdirectory {quoted([path.name for path in adapters])} holds an "
            "adapter: PEFT saves an adapter that is not called 'default' in a subdirectory of its name. Give "
            f"{str(adapters[0])!r}."
        )
    if reason := other_megatron_format(directory):
        return CandidateError(f"{directory}: {reason}")
    names = files_in(directory)
    subdirectories = sorted(_with_weights(directory, 0))
    if (
        not subdirectories
        and not any(map(is_weights, names))
        and (format_name := named_format(directory / name for name in names))
    ):
        return CandidateError(f"{directory}: is no candidate: {format_name}")
    files = [name for name in names if name.endswith(".safetensors")]
    if files and all(map(_SHARD.search, files)) and not any(name.endswith(".index.json") for name in names):
        return CandidateError(
            f"{directory}: is no candidate: it holds {quoted(files)}, but not their index "
            "(model.safetensors.index.json). Copy it from where the checkpoint was saved, or save the checkpoint again."
        )
    several = f", but {len(files)} *.safetensors files without an index ({quoted(files)})" if files else ""
    odd = [path.name for path in directory.iterdir() if is_weights(path.name) and not (path.is_file() or path.is_dir())]
    irregular = f" {quoted(odd)} exists, but is not a regular file, or is a broken link." if odd else ""
    return CandidateError(
        f"{directory}: is no candidate: it holds none of {', '.join(LOADERS['transformers'])}, no single *.safetensors "
        f"file{several}, and is not a checkpoint folder of DeepSpeed (*_model_states.pt, latest) or "
        f"torch.distributed.checkpoint (.metadata).{irregular} {_fix(directory, subdirectories)}"
    )


def _fix(directory: Path, subdirectories: Sequence[Path]) -> str:
    if not subdirectories:
        return (
            "Name the file itself, leave the directory out, or, if its subdirectories are the candidates, write "
            f"'{directory}/*'."
        )
    listed = quoted(sorted(str(path.relative_to(directory)) for path in subdirectories))
    steps = [path for path in subdirectories if path.parent == directory and step_of(path, parents=0) is not None]
    if len(steps) > 1:
        prefixes = {path.name.rstrip("0123456789") for path in steps}
        prefix = prefixes.pop() if len(prefixes) == 1 else ""
        return f"There are weights in {listed}: if these are the candidates, write '{directory}/{prefix}*'."
    return f"There are weights in {listed}: name that folder itself, as in {str(min(subdirectories))!r}."


def _in_parts(directory: Path) -> bool:
    return (directory / METADATA).is_file() or has_rank_files(directory) or sharded_in(directory) is not None


def _with_weights(directory: Path, depth: int) -> Iterator[Path]:
    """Yield the folders in a directory that are candidates, not those within them."""
    for path in sorted(directory.iterdir())[:_MAX_SEEN]:
        if path.name.startswith(".") or path.is_symlink() or not path.is_dir():
            continue
        try:
            known = weights_in(path) or is_deepspeed(path) or _in_parts(path)
        except CandidateError:  # weights of several libraries
            known = True
        except OSError:
            continue
        if known:
            yield path
        elif depth < _MAX_DEPTH - 1:
            yield from _with_weights(path, depth + 1)
