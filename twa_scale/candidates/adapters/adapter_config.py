"""What the adapter_config.json of PEFT says of an adapter: its kind, its ranks and its scalings."""

import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite, sqrt
from pathlib import Path
from typing import Any

from twa_scale.base.inputs import MAX_JSON, brief, parse_json, read_bounded
from twa_scale.candidates.candidate import Candidate
from twa_scale.candidates.directory import LOADERS
from twa_scale.errors import CandidateError

ADAPTER_CONFIG = "adapter_config.json"
"""The file beside the weights of an adapter that says what they mean."""
_PREFIX = "base_model.model."  # what PEFT puts before the names of the model that it wraps
_CHANGES_BASE = ("pissa", "corda", "olora", "loftq")  # initializations that subtract the adapter from the base weights


@dataclass(frozen=True)
class AdapterConfig:
    """The settings that decide what the tensors of an adapter mean."""

    path: Path
    """The file, as messages name it."""
    settings: Mapping[str, Any]
    """Its content."""

    @property
    def kind(self) -> str:
        """The `peft_type`: LORA, IA3, .."""
        return str(self.settings.get("peft_type", "")).upper()

    def rank(self, module: str) -> int:
        """Return the rank r that the configuration gives the factors of a module.

        Raises:
            CandidateError: a value that is no rank, or a pattern that is no regular expression.
        """
        rank = self._of_module("r", "rank_pattern", module)
        if type(rank) is not int or rank < 1:
            raise CandidateError(f"{self.path}: the rank of {module!r} is {brief(rank)}; it has to be an integer >= 1.")
        return rank

    def scaling(self, module: str) -> float:
        """Return the factor s of the update s B A of a module: alpha / r, or alpha / sqrt(r) with `use_rslora`.

        Raises:
            CandidateError: as `rank` does, or an alpha that is no number.
        """
        alpha, rank = self._of_module("lora_alpha", "alpha_pattern", module), self.rank(module)
        if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not isfinite(alpha) or alpha == 0:
            raise CandidateError(
                f"{self.path}: lora_alpha of {module!r} is {brief(alpha)}; it has to be a finite number other than 0."
            )
        return float(alpha) / (sqrt(rank) if self.settings.get("use_rslora") else rank)

    @property
    def changes_base(self) -> str | None:
        """The `init_lora_weights` with which loading subtracts the first adapter from the base weights, or None."""
        init = self.settings.get("init_lora_weights")
        return init if isinstance(init, str) and init.lower().startswith(_CHANGES_BASE) else None

    def _of_module(self, key: str, patterns: str, module: str) -> Any:
        """Return a setting of a module as PEFT finds it: by the first pattern that its name ends with."""
        by_pattern = self.settings.get(patterns) or {}
        if not isinstance(by_pattern, Mapping):
            raise CandidateError(f"{self.path}: {patterns} is {brief(by_pattern)}; it has to be a mapping.")
        name = module.removeprefix(_PREFIX)
        for pattern, value in by_pattern.items():
            try:
                found = re.match(rf"(.*\.)?({pattern})$", name)
            except re.error as error:
                raise CandidateError(f"{self.path}: {patterns}: {pattern!r} is no pattern: {error}.") from None
            if found:
                return value
        return self.settings.get(key)


def adapter_config(candidate: Candidate) -> AdapterConfig | None:
    """Return the configuration of a candidate that is an adapter; None for any other.

    Raises:
        CandidateError: a file that is no JSON object.
    """
    name = candidate.file_name
    if candidate.directory is None or name is None or name not in LOADERS["peft"]:
        return None
    path = candidate.directory / ADAPTER_CONFIG
    if not path.is_file():
        return None
    try:
        settings = parse_json(read_bounded(path, MAX_JSON))
    except ValueError as error:
        raise CandidateError(f"{path}: is no JSON ({error}). Write the adapter again.") from None
    if not isinstance(settings, dict):
        raise CandidateError(f"{path}: holds {brief(settings)}, no settings by name. Write the adapter again.")
    return AdapterConfig(path, settings)


def with_ranks(content: bytes, ranks: Mapping[str, int]) -> bytes:
    """Return an adapter_config.json of other ranks whose products are not scaled: alpha is the rank.

    Args:
        content: of one of the adapters.
        ranks: of every module, by its name in the file of weights.
    """
    settings = parse_json(content)
    assert isinstance(settings, dict)
    ((rank, _),) = Counter(ranks.values()).most_common(1)
    others = {module.removeprefix(_PREFIX): other for module, other in ranks.items() if other != rank}
    patterns = {f"^{re.escape(module)}": other for module, other in others.items()}  # PEFT would take any ending
    settings |= {"r": rank, "lora_alpha": rank, "rank_pattern": patterns, "alpha_pattern": dict(patterns)}
    settings |= {"use_rslora": False, "init_lora_weights": True}
    return (json.dumps(settings, indent=2) + "\n").encode()
