"""The files, names and metadata of the candidates that an output copies, so that loaders of candidates can read it."""

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod

import torch

from twa_scale.base.inputs import parse_json
from twa_scale.base.notices import notice
from twa_scale.candidates.adapters import ADAPTER_CONFIG, ranks_of, with_ranks
from twa_scale.candidates.candidate import Candidate
from twa_scale.candidates.compatibility import differences
from twa_scale.candidates.directory import INDEX, LOADERS, TORCH_SUFFIXES
from twa_scale.candidates.dtypes import stored_dtype, widest
from twa_scale.candidates.side_files import side_files, with_dtype

BASE = "model"
_UNLIMITED = 1 << 62
_DTYPES = {
    name: dtype
    for dtype, names in {
        torch.float16: ("fp16", "float16"),
        torch.bfloat16: ("bf16", "bfloat16"),
        torch.float32: ("fp32", "float32"),
    }.items()
    for name in names
}
_PRECISION = re.compile(rf"(?P<plain>.+)\.(?P<name>{'|'.join(_DTYPES)})")
"""The names of files of one precision, such as `diffusion_pytorch_model.fp16`."""
_ONE_FILE = {name.split(".")[0] for library in ("peft", "open_clip") for name in LOADERS[library]}


@dataclass(frozen=True)
class CarriedFiles:
    """The parts of candidates that an output copies. They are read early: candidates may be removed during a run."""

    base: str = BASE
    """The name of the weight files, without suffix and number."""
    metadata: Mapping[str, str] = field(default_factory=dict)
    """The metadata in the safetensors header of the last candidate."""
    files: Mapping[str, bytes] = field(default_factory=dict)
    """The small files of the last candidate, by their path in its directory."""
    wider: torch.dtype | None = None
    """The default dtype of most weights of the output, if it differs from that of the last candidate."""
    code: bool = False
    """Whether code of the last candidate is copied."""

    def files_for(self, dtype: torch.dtype | None) -> dict[str, bytes]:
        """Return the small files; a dtype in config.json is replaced by that of the output."""
        config = self.files.get("config.json")
        dtype = dtype or self.wider
        changed = {} if dtype is None or config is None else {"config.json": with_dtype(config, dtype)}
        return {**self.files, **changed}

    def base_for(self, dtype: torch.dtype | None) -> str:
        """Return the name of the weight files, without a precision that is not that of the output."""
        dtype = dtype or self.wider
        match = _PRECISION.fullmatch(self.base)
        return match["plain"] if match and dtype not in (None, _DTYPES[match["name"]]) else self.base

    def shard_size(self, limit: str | int) -> str | int:
        """Return the largest number of bytes of one file: unlimited for loaders of one file (PEFT, open_clip)."""
        return _UNLIMITED if self.base in _ONE_FILE else limit


def carried_files(
    candidates: Sequence[Candidate], *, files: bool = True, code: bool = False, notify: Callable[[str], None] = notice
) -> CarriedFiles:
    """Return the parts of the last candidate that an output copies.

    Args:
        candidates: the candidates, in order.
        files: whether to read the small files; only one rank needs them.
        code: whether they include code.
        notify: see `side_files`.
    """
    last = candidates[-1]
    for line in differences(candidates) if files else ():
        notify(line)
    small = side_files(last.directory, code=code, notify=notify) if files else {}
    if "config.json" in small and (fault := _fault(small["config.json"])):
        notify(
            f"{last.directory}/config.json: is not valid JSON ({fault}). It is copied as it is, also if the output has "
            "another dtype than the one that it names."
        )
    if (ranks := ranks_of(last)) and ADAPTER_CONFIG in small:
        small[ADAPTER_CONFIG] = with_ranks(small[ADAPTER_CONFIG], ranks)
    return CarriedFiles(
        _base(candidates),
        {key: value for key, value in last.metadata.items() if "hash" not in key.lower()},
        small,
        _wider(candidates),
        code,
    )


def _fault(config: bytes) -> str | None:
    """Return the reason why a config.json cannot be read, or None."""
    try:
        parse_json(config)
    except ValueError as error:
        return str(error)
    return None


def _wider(candidates: Sequence[Candidate]) -> torch.dtype | None:
    """Return the dtype of most elements of the output; None if it is that of most elements of the last candidate."""
    last = candidates[-1]
    before, after = Counter[torch.dtype](), Counter[torch.dtype]()
    for name in last.names():
        if last.dtype(name).is_floating_point:
            before[stored_dtype(last, name)] += prod(last.shape(name))
            after[widest(candidates, name)] += prod(last.shape(name))
    if not after:
        return None
    (before_dtype, _), (now, _) = before.most_common(1)[0], after.most_common(1)[0]
    return now if now != before_dtype else None


def _base(candidates: Sequence[Candidate]) -> str:
    """Return the name of weight files that loaders expect.

    It is the name of the last candidate, if that is a directory or if all candidates have the same name. Names of
    single files, such as step-1.pt, are not used. pytorch_model.bin becomes model.safetensors, as in transformers.
    """
    last = candidates[-1]
    name = last.file_name
    same_name = len(candidates) > 1 and all(candidate.file_name == name for candidate in candidates)
    if name is None or (last.directory is None and not same_name):
        return BASE
    name = name.removesuffix(INDEX)
    suffixes = "|".join(map(re.escape, (".safetensors", *TORCH_SUFFIXES)))
    base = re.sub(rf"({suffixes})$", "", name, flags=re.IGNORECASE)
    return BASE if base in ("", "pytorch_model") else base
