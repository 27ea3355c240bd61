"""Examples of a language model: windows over all tokens, or pieces of documents."""

import numpy as np
import torch

from twa_scale.errors import ConfigError
from twa_scale.run.tasks.task import Batch
from twa_scale.run.tasks.tokens.sequence import Array, Concatenation

IGNORED = -100
"""The label of a token that is not predicted, as in torch's cross-entropy."""
_CHECKED = 16  # examples of a split whose tokens are checked at the start


class Windows:
    """Examples {"tokens": int64 (length,)}: disjoint windows over a concatenation.

    With labels they also have "labels": int64 (length - 1,), the tokens after the first; IGNORED for tokens that are
    not predicted. With positions they also have "positions": int64 (length - 1,), the position of each token except the
    last in the part of its document that is in the window.
    """

    def __init__(
        self,
        tokens: Concatenation,
        length: int,
        key: str,
        *,
        labels: bool,
        starts: Array | None,
        positions: bool = False,
    ) -> None:
        """Divide the tokens into windows, and check some of them. An incomplete last window is dropped.

        Args:
            tokens: the tokens.
            length: the number of tokens of a window.
            key: the setting in error messages.
            labels: whether the examples have labels.
            starts: the positions of the first tokens of documents, which are not predicted, or None to predict them.
            positions: whether the examples have positions, for which `starts` and labels are needed.

        Raises:
            ConfigError: there are fewer tokens than one window, or tokens outside the vocabulary.
        """
        self._tokens, self._length, self._labels, self._starts = tokens, length, labels, starts
        self._positions = positions
        if tokens.count < length:
            raise ConfigError(
                f"{key}: {tokens.num_files} files with {tokens.count} tokens, fewer than one window of context + 1 = "
                f"{length}. Give more data, a shorter `context`, other `fractions`, or files for each split."
            )
        _check_some(self)

    def __len__(self) -> int:
        return self._tokens.count // self._length

    def __getitem__(self, index: int) -> Batch:
        if not 0 <= index < len(self):
            raise IndexError(f"window {index} of {len(self)}")
        start, stop = index * self._length, (index + 1) * self._length
        tokens = self._tokens.read(start, stop)
        if not self._labels:
            return {"tokens": torch.from_numpy(tokens)}
        labels = _labels(self._tokens, tokens, start)
        example = {"tokens": torch.from_numpy(tokens), "labels": torch.from_numpy(labels)}
        if self._starts is not None:
            first, last = np.searchsorted(self._starts, (start + 1, stop))
            boundaries = self._starts[first:last] - start
            labels[boundaries - 1] = IGNORED
            if self._positions:
                example["positions"] = torch.from_numpy(_positions(boundaries, self._length - 1))
        return example


class Pieces:
    """Examples like those of `Windows` with labels, each from one document.

    A document of more than `length` tokens becomes several pieces. A piece starts with the last token of the previous
    one, so that all tokens except the first are predicted once. Shorter pieces are padded on the right, so that no
    other token attends to the padding, whose labels are IGNORED.
    """

    def __init__(self, tokens: Concatenation, length: int, key: str) -> None:
        """Find the pieces, and check some of them. Documents of one token are left out.

        Args:
            tokens: the tokens, whose documents have to be known.
            length: the number of tokens of an example.
            key: the setting in error messages.

        Raises:
            ConfigError: the documents are not known, none of them has two tokens, or a token is outside the vocabulary.
        """
        self._tokens, self._length = tokens, length
        starts = tokens.starts(key)
        sizes = np.diff(starts, append=tokens.count)
        numbers = np.maximum(-(-(sizes - 1) // (length - 1)), 0)
        offsets = np.arange(numbers.sum()) - np.repeat(np.cumsum(numbers) - numbers, numbers)
        self._firsts = np.repeat(starts, numbers) + offsets * (length - 1)
        self._lasts = np.minimum(self._firsts + length, np.repeat(starts + sizes, numbers))
        if not len(self._firsts):
            raise ConfigError(f"{key}: no document has two tokens or more. Give documents with text.")
        _check_some(self)

    def __len__(self) -> int:
        return len(self._firsts)

    def __getitem__(self, index: int) -> Batch:
        if not 0 <= index < len(self):
            raise IndexError(f"piece {index} of {len(self)}")
        start, stop = int(self._firsts[index]), int(self._lasts[index])
        tokens, labels = np.zeros(self._length, np.int64), np.full(self._length - 1, IGNORED, np.int64)
        size = stop - start
        tokens[:size] = self._tokens.read(start, stop)
        labels[: size - 1] = _labels(self._tokens, tokens[:size], start)
        return {"tokens": torch.from_numpy(tokens), "labels": torch.from_numpy(labels)}


def _positions(starts: Array, length: int) -> Array:
    """Return the position of each token in its document, for documents that begin at 0 and at `starts`."""
    begins = np.zeros(length, np.int64)
    boundaries = starts[starts < length]
    begins[boundaries] = boundaries
    return np.arange(length) - np.maximum.accumulate(begins)


def _labels(all_tokens: Concatenation, tokens: Array, start: int) -> Array:
    """Return the tokens after the first of `tokens`, which begin at `start`, with IGNORED for the hidden ones."""
    labels: Array = tokens[1:].copy()
    if all_tokens.has_hidden:
        labels[all_tokens.hidden(start, start + len(tokens))[1:]] = IGNORED
    return labels


def _check_some(examples: Windows | Pieces) -> None:
    for i in range(_CHECKED):
        examples[i * (len(examples) - 1) // (_CHECKED - 1)]
