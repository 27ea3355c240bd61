"""The model card of an output, README.md, which describes the average for readers and for the Hugging Face hub."""

import re
import shlex
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import yaml

from twa_scale.base.inputs import parse_json
from twa_scale.base.names import plural, without_common_folders

CARD = "README.md"
SNAPSHOT_LABEL = "the snapshot of step "
"""The start of the labels of snapshots that a window holds, which are in no files."""
_MARKS = "<!-- twa_scale: begin -->", "<!-- twa_scale: end -->"
_OWN_CARD = re.compile(rf"{re.escape(_MARKS[0])}.*?{re.escape(_MARKS[1])}\n?", re.DOTALL)
_WHOLE_OWN_CARD = re.compile(rf"---\n(?:(?!---).)*- twa_scale\n---\s*{_OWN_CARD.pattern}\s*", re.DOTALL)
"""A card of this program that nobody has changed. The metadata end with its last tag."""
READ = ("config.json", "adapter_config.json", "model_index.json", "modules.json")
"""Files with the library that loads the weights, and with the base model."""
_BASE_KEYS = ("base_model_name_or_path", "_name_or_path")
_REPOSITORY = re.compile(r"(?!.*(--|\.\.))[\w][\w.-]*/[\w][\w.-]*[\w]")
_IN_CACHE = re.compile(r"models--([^/]+?)--([^/]+)/snapshots/")
_MAX_ROWS = 200


def with_card(files: Mapping[str, bytes], origin: Mapping[str, Any], tags: Sequence[str] = ()) -> dict[str, bytes]:
    """Return the small files of an output with its model card.

    A card that is copied from a candidate gets a section between two markers, which replaces that of an earlier
    average; its other text is unchanged. A card that is not UTF-8 is copied without a section.

    Args:
        files: the small files, by their path in the output.
        origin: the `provenance` of the output.
        tags: further tags of a new card.
    """
    try:
        carried = files.get(CARD, b"").decode()
    except UnicodeDecodeError:
        return dict(files)
    is_new = not carried.strip() or _WHOLE_OWN_CARD.fullmatch(carried) is not None
    section = f"{_MARKS[0]}\n{_section(origin, is_carried=not is_new)}\n{_MARKS[1]}\n"
    if is_new:
        metadata = yaml.safe_dump(_metadata(files, origin, tags), sort_keys=False, allow_unicode=True)
        text = f"---\n{metadata}---\n\n{section}"
    elif _OWN_CARD.search(carried):
        text = _OWN_CARD.sub(lambda _: section, carried, count=1)
    else:
        text = f"{carried.rstrip()}\n\n{section}"
    return {**files, CARD: text.encode()}


def _metadata(files: Mapping[str, bytes], origin: Mapping[str, Any], tags: Sequence[str]) -> dict[str, Any]:
    """Return the metadata of a new card: the base model and the library, where they are known, and tags."""
    metadata: dict[str, Any] = {}
    merged = [_IN_CACHE.search(f"{label}/") for label in origin.get("candidates", ())]
    if merged and all(merged):
        metadata["base_model"] = list(dict.fromkeys(f"{match[1]}/{match[2]}" for match in merged if match))
        metadata["base_model_relation"] = "merge"
    elif base := _base_model(files):
        metadata["base_model"] = base
    if library := _library(files):
        metadata["library_name"] = library
    merge = ["merge"] if origin.get("candidates") else []
    averaged = ["weight-averaging"] if merge or "ema" in origin else []
    return {**metadata, "tags": [*tags, *merge, *averaged, "twa_scale"]}


def _base_model(files: Mapping[str, bytes]) -> str | None:
    """Return the model on the hub that a configuration names. Names of local directories are left out."""
    for config in (_config(files, "adapter_config.json"), _config(files, "config.json")):
        for key in _BASE_KEYS:
            name = config.get(key)
            if isinstance(name, str) and len(name) <= 96 and _REPOSITORY.fullmatch(name) and not Path(name).exists():
                return name
    return None


def _library(files: Mapping[str, bytes]) -> str | None:
    config = _config(files, "config.json")
    libraries = {
        "peft": "adapter_config.json" in files,
        "sentence-transformers": "modules.json" in files,
        "diffusers": "model_index.json" in files or "_diffusers_version" in config,
        "transformers": bool({"architectures", "transformers_version"} & set(config)),
    }
    return next((name for name, uses in libraries.items() if uses), None)


def _config(files: Mapping[str, bytes], name: str) -> dict[str, Any]:
    try:
        config = parse_json(files.get(name, b"{}"))
    except ValueError:
        return {}
    return config if isinstance(config, dict) else {}


def _section(origin: Mapping[str, Any], *, is_carried: bool) -> str:
    """Return the text between the markers."""
    candidates = origin.get("candidates", ())
    names = without_common_folders(candidates)
    coefficients = _coefficients(origin)
    heading = "##" if is_carried else "#"
    parts = [f"{heading} {_title(origin)}"]
    if is_carried:
        parts.append("Text and metadata outside of this section are those of the last checkpoint, not of the average.")
    parts.append(f"{_description(origin)} twa_scale {origin['version']} wrote them. {_method(origin)}".rstrip())
    if coefficients:
        parts.append(_table(names, coefficients, origin.get("elements")))
    if coefficients or "config" in origin:
        parts.append("`twa_scale.json` next to the weights has all coefficients and settings.")
    elif "ema" in origin:
        parts.append("`twa_scale.json` next to the weights has the settings.")
    if candidates and all(label.startswith(SNAPSHOT_LABEL) for label in candidates):
        parts.append("The checkpoints were held in memory during the training, and are in no files.")
    elif command := _command(names, coefficients, origin):
        parts.append(f"An average with the same coefficients, in the folder of the checkpoints:\n\n{command}")
    elif "config" in origin:
        parts.append(
            "If `twa-scale run` has trained the coefficients, `RUN` is the directory of this run:\n\n"
            "```sh\ntwa-scale export RUN --out average\n```"
        )
    return "\n\n".join(parts)


def _title(origin: Mapping[str, Any]) -> str:
    if candidates := origin.get("candidates"):
        return f"Average of {_count(len(candidates), 'checkpoint')}"
    return "Running average of a training" if "ema" in origin else "Trained weights"


def _description(origin: Mapping[str, Any]) -> str:
    """Return a sentence that describes the weights."""
    if origin.get("candidates"):
        sum_ = "The weights are the sum of a · w over the checkpoints w below, with the coefficients a."
        return sum_ + _rounding(origin)
    sentences = [_code(str(origin["asked"]))] if "asked" in origin else []
    ema = origin.get("ema", {})
    sentences += [f"{key.replace('_', '-')} {ema[key]}" for key in ("decay", "half_life") if key in ema]
    named = f" ({', '.join(sentences)})" if sentences else ""
    step = f" at step {origin['step']}" if "step" in origin else ""
    return f"The weights are {origin['wrote']}{named}{step}."


def _rounding(origin: Mapping[str, Any]) -> str:
    """Return a sentence about the number format in which the checkpoints were held, if it is packed."""
    settings = origin.get("config", origin.get("window"))
    store = str(settings.get("store", "")) if isinstance(settings, Mapping) else ""
    if not store.startswith("packed"):
        return ""
    bits = _count(int(store.removeprefix("packed")), "bit")
    return f" Each w was held with its differences rounded to {bits} for each element (`{store}`)."


def _method(origin: Mapping[str, Any]) -> str:
    config = origin.get("config")
    if not isinstance(config, Mapping):
        asked = origin.get("asked")
        if asked is None or isinstance(asked, list) or not origin.get("candidates"):
            return ""
        return f"The coefficients are fixed: {_code(str(asked))}."
    step = f", of step {origin['step']}" if "step" in origin else ""
    settings = ", ".join(f"{key}: {_code(str(config.get(key)))}" for key in ("groups", "basis", "center"))
    groups = _count(len(origin.get("groups", ())), "group")
    return (
        f"There is one coefficient for each checkpoint in {groups} of tensors{step} ({settings}). The method is "
        "[Trainable Weight Averaging](https://arxiv.org/abs/2205.13104)."
    )


def _coefficients(origin: Mapping[str, Any]) -> list[list[float]]:
    """Return the coefficients of each candidate, in each group."""
    coefficients = origin.get("coefficients")
    columns = coefficients if coefficients is not None else [[weight] for weight in origin.get("weights") or ()]
    return columns if len(columns) == len(origin.get("candidates", ())) else []


def _table(names: Sequence[str], coefficients: Sequence[Sequence[float]], elements: Sequence[int] | None) -> str:
    several = len(coefficients[0]) > 1
    columns = ["mean coefficient", "smallest", "largest"] if several else ["coefficient"]
    lines = [f"| checkpoint | {' | '.join(columns)} |", "| --- |" + " --: |" * len(columns)]
    shares = elements if elements and sum(elements) else [1] * len(coefficients[0])
    for name, row in list(zip(names, coefficients, strict=True))[:_MAX_ROWS]:
        mean = sum(a * share for a, share in zip(row, shares, strict=True)) / sum(shares)
        numbers = [mean, min(row), max(row)] if several else [mean]
        lines.append(f"| {_code(name)} | {' | '.join(f'{number:.6g}' for number in numbers)} |")
    if len(names) > _MAX_ROWS:
        lines.append(f"| and {len(names) - _MAX_ROWS} more |{' |' * len(columns)}")
    return "\n".join(lines)


def _command(names: Sequence[str], coefficients: Sequence[Sequence[float]], origin: Mapping[str, Any]) -> str | None:
    """Return the command that computes the same average from the files, or None."""
    plain = coefficients and len(coefficients[0]) == 1 and not {"rows", "rank"} & set(origin)
    if not plain or any("\n" in name or "`" in name for name in names):
        return None
    words = [shlex.quote(f"{name}:{a!r}") for name, (a,) in zip(names, coefficients, strict=True)]
    return "```sh\ntwa-scale average " + " \\\n  ".join([*words, "--out average"]) + "\n```"


def _code(text: str) -> str:
    """Return text that Markdown shows unchanged, also in a table."""
    escaped = escape(" ".join(text.split()))
    for mark in "|`*_[]$\\":
        escaped = escaped.replace(mark, f"&#{ord(mark)};")
    return f"<code>{escaped}</code>"


def _count(count: int, noun: str) -> str:
    return f"{count} {plural(count, noun)}"
