"""Expand a path or a glob into paths in natural order, and refuse globs that match too much."""

import glob
import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from twa_scale.base.paths import matching, path_of
from twa_scale.base.urls import Url, is_url, local_path
from twa_scale.candidates.directory import AnyPath, is_averaged, is_weights, plain_names
from twa_scale.candidates.formats.deepspeed_universal import LATEST, is_run_of_universal, is_universal
from twa_scale.candidates.formats.megatron import TRACKER
from twa_scale.candidates.other_formats import named_format
from twa_scale.errors import CandidateError

_PART = re.compile(
    r"(?<![a-z0-9])(consolidated\.|(zero_)?((mp|tp|pp|ep|dp)_)?rank[-_]?|shard[-_]?|model[-_]part[-_]?|(mp|tp)[-_]?)"
    r"(?P<number>\d+)",
    re.IGNORECASE,
)
"""Matches the names of parts of one model, such as the files of the ranks of Llama and Megatron."""

_MARKERS = (TRACKER, "latest", LATEST, "latest_wandb_artifact_path.txt")
"""Files of Megatron-LM and DeepSpeed with the name of the last folder next to them."""


def expand(item: str | Path) -> tuple[Sequence[Path | Url], str | None]:
    """Return the path and None, or the paths that match it as a glob, and the glob.

    The longest prefix of folders that exist is not a part of the pattern, even with special characters in its names.

    Raises:
        CandidateError: nothing is found, or a glob also matches a path that is not a candidate, or matches versions
            or parts of one model.
        OSError: the system refuses the path.
    """
    text = str(item)
    local = local_path(text)
    if local is None and is_url(text):
        return _expanded(Url(text))
    path = local or path_of(text)
    if path.exists():
        return [path], None
    if path.is_symlink():
        raise CandidateError(f"{path}: is a broken link, or a loop of links. Copy the files that it should point to.")
    if not glob.has_magic(text):
        raise CandidateError(f"{path}: there is no such file or directory, seen from {Path.cwd()}.{_hint(text, path)}")
    matches = _without_markers(_matches(path))
    if not matches:
        raise CandidateError(
            f"candidates {text!r}: the pattern matches nothing, seen from {Path.cwd()}. It must match at "
            f"least one file or directory of weights.{_hint(text, path)}"
        )
    _require_candidates(text, matches)
    return matches, text


def _expanded(url: Url) -> tuple[list[Url], str | None]:
    """Return the URL, or the URLs that it matches as a pattern."""
    if not url.is_pattern():
        return [url], None
    url = Url(url.url.rstrip("/"))  # in a shell, "step-*/" matches directories
    matches = [match for match in url.matches() if not match.name.startswith(".") and ".tmp-" not in match.name]
    matches = _without_markers(sorted(matches, key=_natural))
    if not matches:
        raise CandidateError(
            f"candidates {str(url)!r}: the pattern matches nothing. It must match at least one file or directory of "
            "weights."
        )
    _require_candidates(str(url), matches)
    return matches, url.url


def _matches(path: Path) -> list[Path]:
    root, matches = matching(path)
    # Unfinished outputs have a hidden name, or, from earlier versions, one that ends in .tmp-*.
    depth = len(root.parts)
    finished = [m for m in matches if not any(p.startswith(".") or ".tmp-" in p for p in m.parts[depth:])]
    return sorted(finished, key=_natural)


def _without_markers(matches: Sequence[AnyPath]) -> list[AnyPath]:
    """Leave out files with the name of the last folder, if folders also match."""
    folders = any(match.is_dir() for match in matches)
    return [match for match in matches if not (folders and match.name in _MARKERS and match.is_file())]


def _natural(path: Path | Url) -> list[tuple[int, int, str]]:
    """Return a sort key: numbers by value, other characters as text; separators first, to keep folders together."""
    pieces = re.split(r"(\d+)", str(path).replace("/", "\0"))
    return [(0, int(piece), piece) if piece.isdecimal() else (1, 0, piece) for piece in pieces if piece]


def _require_candidates(pattern: str, matches: Sequence[Path | Url]) -> None:
    """Check that a pattern matches candidates only, and not several versions or parts of one model."""
    if broken := next((match for match in matches if not match.exists()), None):
        raise CandidateError(
            f"candidates {pattern!r}: the pattern matches {str(broken)!r}, a broken link, or a loop of links. "
            "Remove it, or narrow the pattern."
        )
    if strange := next((match for match in matches if not match.is_dir() and not is_weights(match.name)), None):
        seen = "" if isinstance(strange, Url) else f", seen from {Path.cwd()}"
        if format_name := named_format([strange]):
            raise CandidateError(f"candidates {pattern!r}: the pattern matches {str(strange)!r}: {format_name}")
        raise CandidateError(
            f"candidates {pattern!r}: the pattern also matches {str(strange)!r}, which holds no weights{seen}. "
            "Narrow the pattern, for instance to 'step-*' or '*.safetensors'."
        )
    if reason := versions_or_parts(matches):
        raise CandidateError(
            f"candidates {pattern!r}: the pattern matches {reason} Narrow the pattern, or give a list of paths if all "
            "are meant."
        )


def versions_or_parts(paths: Sequence[Path | Url]) -> str | None:
    """Return a description of two paths whose names are those of versions or parts of one model, else None.

    Versions are raw and averaged weights, or two precisions.
    """
    parts: dict[str, dict[int, Path | Url]] = defaultdict(dict)
    by_parent: dict[Path | Url, list[str]] = defaultdict(list)
    for path in paths:
        by_parent[path.parent].append(path.name)
        for match in _PART.finditer(str(path)):
            start, stop = match.span("number")
            parts[f"{str(path)[:start]}#{str(path)[stop:]}"][int(match["number"])] = path
    for numbers in parts.values():
        if len(numbers) > 1 and sorted(numbers) in (list(range(len(numbers))), list(range(1, len(numbers) + 1))):
            first, second, *_ = (str(numbers[number]) for number in sorted(numbers))
            return f"{first!r} and {second!r}, which by their names are parts of one model, of one rank each."
    for parent, names in by_parent.items():
        if two := _versions(names) or _universal(parent, names):
            return f"{two[0]!r} and {two[1]!r} in {str(parent)!r}, which by their names are versions of one model."
    return None


def _versions(names: Sequence[str]) -> tuple[str, str] | None:
    averaged = [name for name in names if is_averaged(name)]
    raw = [name for name in names if not is_averaged(name)]
    if raw and averaged:
        return raw[0], averaged[0]
    stored = set(names)
    return next(((plain, name) for name in names for plain in plain_names(name) if plain in stored), None)


def _universal(parent: Path | Url, names: Sequence[str]) -> tuple[str, str] | None:
    """Return a checkpoint of DeepSpeed and its conversion by ds_to_universal.py, or None, as for URLs."""
    if isinstance(parent, Url):
        return None
    stored = set(names)
    for name in names:
        made = f"{name}_universal"
        if made in stored and (is_universal(parent / made) or is_run_of_universal(parent / made)):
            return name, made
    return None


def _hint(text: str, path: Path) -> str:
    """Return a hint for a path that does not exist, or the empty string."""
    backup = next(path.parent.glob(f".{glob.escape(path.name)}.old-????????"), None) if path.name else None
    if backup:
        return f" A writer that was killed has moved it to {str(backup)!r}: rename that."
    if re.search(r"\{.*\}", text):
        return " Braces are expanded by the shell only, and only outside of quotes: give the paths one by one."
    if "," in text and all(Path(part).exists() for part in text.split(",")):
        return " Give the paths one by one, not with commas."
    if re.fullmatch(r"[\w-]+/[\w.-]+", text) and not path.parent.exists():
        return f" A model of the Hugging Face hub has to be downloaded first: `hf download {text} --local-dir DIR`."
    return ""
