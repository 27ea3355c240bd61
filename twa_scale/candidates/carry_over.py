"""What an output takes over from the candidates, so that what reads them reads it."""

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod

import torch

from twa_scale.base.notices import notice
from twa_scale.candidates.adapters import ADAPTER_CONFIG, ranks_of, with_ranks
from twa_scale.candidates.candidate import Candidate
from twa_scale.candidates.compatibility import differences
from twa_scale.candidates.directory import INDEX, LOADERS, TORCH_SUFFIXES
from twa_scale.candidates.dtypes import stored_dtype, widest
from twa_scale.candidates.side_files import side_files, with_dtype

BASE = "model"
_UNLIMITED = 1 << 62
_ONE_FILE = {name.split(".")[0] for library in ("peft", "open_clip") for name in LOADERS[library]}


@dataclass(frozen=True)
class CarriedFiles:
    """Collected when the candidates are opened: they may be gone when the output is written."""

    base: str = BASE
    """What the files of weights are called, without suffix and number."""
    metadata: Mapping[str, str] = field(default_factory=dict)
    """What the header of the last candidate's safetensors says beside the tensors."""
    files: Mapping[str, bytes] = field(default_factory=dict)
    """Small files of the last candidate by their path in its directory."""
    wider: torch.dtype | None = None
    """The type that most weights are written in unless another is asked for, where it is not the last candidate's."""

    def files_for(self, dtype: torch.dtype | None) -> dict[str, bytes]:
        """Return the small files, with a config.json that says the type of the output where it says one."""
        config = self.files.get("config.json")
        dtype = dtype or self.wider
        changed = {} if dtype is None or config is None else {"config.json": with_dtype(config, dtype)}
        return {**self.files, **changed}

    def shard_size(self, most: str | int) -> str | int:
        """Return the most bytes of one file: without limit where loaders read one file only (PEFT, open_clip)."""
        return _UNLIMITED if self.base in _ONE_FILE else most


def carried_files(
    candidates: Sequence[Candidate], *, files: bool = True, code: bool = False, tell: Callable[[str], None] = notice
) -> CarriedFiles:
    """Collect what an output of `candidates` takes over from the last one.

    Args:
        candidates: in their order.
        files: collect the small files, which one rank needs.
        code: with code among them.
        tell: see `side_files`.
    """
    last = candidates[-1]
    for line in differences(candidates) if files else ():
        tell(line)
    small = side_files(last.directory, code=code, tell=tell) if files else {}
    if (ranks := ranks_of(last)) and ADAPTER_CONFIG in small:
        small[ADAPTER_CONFIG] = with_ranks(small[ADAPTER_CONFIG], ranks)
    return CarriedFiles(
        _base(candidates),
        {key: value for key, value in last.metadata.items() if "hash" not in key.lower()},
        small,
        _wider(candidates),
    )


def _wider(candidates: Sequence[Candidate]) -> torch.dtype | None:
    """Return the type that most elements of the output have, where most of the last candidate's have another."""
    last = candidates[-1]
    before, after = Counter[torch.dtype](), Counter[torch.dtype]()
    for name in last.names():
        if last.dtype(name).is_floating_point:
            before[stored_dtype(last, name)] += prod(last.shape(name))
            after[widest(candidates, name)] += prod(last.shape(name))
    if not after:
        return None
    (was, _), (now, _) = before.most_common(1)[0], after.most_common(1)[0]
    return now if now != was else None


def _base(candidates: Sequence[Candidate]) -> str:
    """Return the name that loaders look for: the last candidate's in a directory of its own, or that which all have.

    Files that lie in one directory under names of their own, as step-1.pt, name no output. transformers writes
    model.safetensors where it wrote pytorch_model.bin before.
    """
    last = candidates[-1]
    name = last.file_name
    alike = len(candidates) > 1 and all(candidate.file_name == name for candidate in candidates)
    if name is None or (last.directory is None and not alike):
        return BASE
    name = name.removesuffix(INDEX)
    suffixes = "|".join(map(re.escape, (".safetensors", *TORCH_SUFFIXES)))
    base = re.sub(rf"({suffixes})$", "", name, flags=re.IGNORECASE)
    return BASE if base in ("", "pytorch_model") else base
