"""Read the adapter_config.json of PEFT: the kind, the ranks and the scalings of an adapter."""

import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite, sqrt
from pathlib import Path
from typing import Any, TypeVar

from twa_scale.base.inputs import MAX_JSON, brief, parse_json, read_bounded
from twa_scale.candidates.candidate import Candidate
from twa_scale.candidates.directory import LOADERS
from twa_scale.errors import CandidateError

ADAPTER_CONFIG = "adapter_config.json"
"""The file with the settings of an adapter, next to its weights."""
ADAPTER_BASE = "adapter_model"
"""The name of its file of weights, without the suffix."""
PREFIX = "base_model.model."
"""The prefix that PEFT adds to the names of the model that it wraps."""
_MERGED = "Merge each adapter into its base model (merge_and_unload), and average the full weights."
_Number = TypeVar("_Number", int, float)
_CHANGES_BASE = ("pissa", "corda", "olora", "loftq")  # initializations that subtract the adapter from the base weights


@dataclass(frozen=True)
class AdapterConfig:
    """The settings that define the meaning of the tensors of an adapter."""

    path: Path
    """The file, for messages."""
    settings: Mapping[str, Any]
    """Its content."""

    @property
    def kind(self) -> str:
        """The `peft_type`: LORA, IA3, .."""
        return str(self.settings.get("peft_type", "")).upper()

    def rank(self, module: str) -> int:
        """Return the rank r of the factors of a module, given its name in the file of weights.

        Raises:
            CandidateError: a value is not a rank, a pattern is not a regular expression, or the parameters of one
                module have different ranks.
        """
        return self._only(module, "rank_pattern", {self._rank(name) for name in self._names(module)})

    def scaling(self, module: str, looked_up: str | None = None) -> float:
        """Return the factor s of the update s B A of a module: alpha / r, or alpha / sqrt(r) with `use_rslora`.

        Args:
            module: the name of the module in the file of weights.
            looked_up: the name that PEFT compares with patterns, if it is known.

        Raises:
            CandidateError: as `rank` does, or alpha is not a number.
        """
        return self._only(module, "alpha_pattern", {self._scaling(name) for name in self._names(module, looked_up)})

    def possible_scalings(self, module: str) -> dict[float, int]:
        """Return the possible scalings of the factors of a module, with the rank for each.

        There are several if PEFT adapts several parameters of one module, with patterns that distinguish them.
        """
        return {self._scaling(name): self._rank(name) for name in self._names(module)}

    @property
    def scaling_settings(self) -> tuple[object, ...]:
        """The settings that determine the ranks and scalings of all modules."""
        keys = ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern")
        return tuple(self.settings.get(key) or None for key in keys)

    def _rank(self, name: str) -> int:
        rank = self._looked_up("r", "rank_pattern", name)
        if type(rank) is not int or rank < 1:
            raise CandidateError(f"{self.path}: the rank of {name!r} is {brief(rank)}; it has to be an integer >= 1.")
        return rank

    def _scaling(self, name: str) -> float:
        alpha, rank = self._looked_up("lora_alpha", "alpha_pattern", name), self._rank(name)
        if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not isfinite(alpha) or alpha == 0:
            raise CandidateError(
                f"{self.path}: lora_alpha of {name!r} is {brief(alpha)}; it has to be a finite number other than 0."
            )
        return float(alpha) / (sqrt(rank) if self.settings.get("use_rslora") else rank)

    def _names(self, module: str, looked_up: str | None = None) -> tuple[str, ...]:
        """Return the names that PEFT may compare with patterns for a module of the file.

        This is the name of the module. For `target_parameters` it is the name of the parameter, but the file has the
        name of its module, with `.base_layer` for each further parameter, so that the parameter is not known.
        """
        name = module.removeprefix(PREFIX)
        targets = self.settings.get("target_parameters") or []
        if looked_up is not None or not targets:
            return (looked_up or name,)
        if not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
            raise CandidateError(f"{self.path}: target_parameters is {brief(targets)}; it has to be a list of names.")
        name = name.replace(".base_layer", "")
        result = []
        for owner, _, parameter in (target.rpartition(".") for target in targets):
            if f".{name}".endswith(f".{owner}"):
                result.append(f"{name}.{parameter}")
            elif not owner:  # matches any module with such a parameter
                result += [name, f"{name}.{parameter}"]
        return tuple(result) or (name,)

    def _only(self, module: str, patterns: str, values: set[_Number]) -> _Number:
        if len(values) > 1:
            raise CandidateError(
                f"{self.path}: {patterns} gives parameters of {module!r} different values (target_parameters), and in "
                f"the file of weights it is unknown to which of them the factors belong. {_MERGED}"
            )
        return values.pop()

    @property
    def changes_base(self) -> str | None:
        """The `init_lora_weights` with which loading subtracts the first adapter from the base weights, or None."""
        init = str(self.settings.get("init_lora_weights")).lower()
        return init if init.startswith(_CHANGES_BASE) else None

    def _looked_up(self, key: str, patterns: str, name: str) -> Any:
        """Return a setting as PEFT finds it: that of the first pattern that matches the end of the name."""
        by_pattern = self.settings.get(patterns) or {}
        if not isinstance(by_pattern, Mapping):
            raise CandidateError(f"{self.path}: {patterns} is {brief(by_pattern)}; it has to be a mapping.")
        for pattern, value in by_pattern.items():
            try:
                match = re.match(rf"(.*\.)?({pattern})$", name)
            except re.error as error:
                raise CandidateError(
                    f"{self.path}: {patterns}: {pattern!r} is not a regular expression: {error}."
                ) from None
            if match:
                return value
        return self.settings.get(key)


def adapter_config(candidate: Candidate) -> AdapterConfig | None:
    """Return the configuration of a candidate that is an adapter, or None for other candidates.

    Raises:
        CandidateError: the file is not a JSON object.
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
        raise CandidateError(f"{path}: is not JSON ({error}). Write the adapter again.") from None
    if not isinstance(settings, dict):
        raise CandidateError(f"{path}: holds {brief(settings)}, not settings by name. Write the adapter again.")
    return AdapterConfig(path, settings)


def with_ranks(content: bytes, ranks: Mapping[str, int]) -> bytes:
    """Return an adapter_config.json with other ranks and without scaling: alpha is the rank.

    Args:
        content: the content of the file of one of the adapters.
        ranks: the rank of every module, by its name in the file of weights.
    """
    settings = parse_json(content)
    assert isinstance(settings, dict)
    ((rank, _),) = Counter(ranks.values()).most_common(1)
    others = {module.removeprefix(PREFIX): other for module, other in ranks.items() if other != rank}
    patterns = {f"^{re.escape(module)}": other for module, other in others.items()}  # PEFT would match any ending
    settings |= {"r": rank, "lora_alpha": rank, "rank_pattern": patterns, "alpha_pattern": dict(patterns)}
    settings |= {"use_rslora": False, "init_lora_weights": True}
    return (json.dumps(settings, indent=2) + "\n").encode()
