"""Items of a JSON array, one at a time."""

import json
import re
from collections.abc import Iterator
from typing import TextIO

_CHUNK = 1 << 20  # characters that are read at a time
_MAX = 100_000_000  # characters of one item
_DECODER = json.JSONDecoder()
_SPACE = re.compile(r"\s*")


def array_items(file: TextIO, text: str) -> Iterator[str]:
    """Yield the text of each item of the array in a file.

    Args:
        file: the file, after `text`.
        text: the text that was already read, which begins with "[" or white space.

    Raises:
        ValueError: the text is not a valid array, or the array does not end.
    """
    position, separator = 0, "["
    while True:
        start = _end_of_space(text, position)
        if separator == "," and text[start : start + 1] == "]":
            return
        if text[start : start + 1] not in ("", separator):
            raise ValueError(f"there is {text[start]!r} where {separator!r} or the end of the array should be")
        first = _end_of_space(text, start + 1)
        if separator == "[" and text[first : first + 1] == "]":
            return
        reason = "the array does not end"
        try:
            end = _DECODER.raw_decode(text, first)[1]
        except RecursionError as error:
            raise ValueError("it is nested too deep") from error
        except ValueError as error:
            end, reason = len(text), str(error)
        if end < len(text):
            yield text[first:end]
            position, separator = end, ","
            continue
        more = file.read(_CHUNK) if len(text) < _MAX else ""
        if not more:
            raise ValueError(reason)
        text, position = text[position:] + more, 0


def _end_of_space(text: str, start: int) -> int:
    match = _SPACE.match(text, start)
    assert match is not None
    return match.end()
