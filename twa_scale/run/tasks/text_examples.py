"""Tokenized texts with labels, of which only one example at a time is in memory."""

from collections.abc import Iterable
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from twa_scale.errors import ConfigError
from twa_scale.run.tasks.task import Batch
from twa_scale.run.tasks.tokens import Array, Spool

_BATCH = 256  # texts that are tokenized at a time


class TextExamples:
    """Examples {"input_ids", "attention_mask": int64 (max_length,), "labels": scalar}.

    Examples of pairs also have "token_type_ids", if the tokenizer returns them. The tokens are in a temporary file.
    `token_counts` are the numbers of tokens of the examples, int64 (N,).
    """

    def __init__(self, tokenizer: Any, vocabulary: int, max_length: int, labels: Tensor, key: str) -> None:
        """Create the temporary file, without examples.

        Args:
            tokenizer: has a padding token.
            vocabulary: the size of the model's vocabulary.
            max_length: the length to which texts are truncated and padded.
            labels: the label of each example that will be added.
            key: the setting in error messages.
        """
        self._tokenizer, self._max_length, self._labels = tokenizer, max_length, labels
        self._spool = Spool(key, vocabulary)
        self._has_types = False

    def add(self, rows: Iterable[tuple[str, list[str]]]) -> None:
        """Tokenize and add all examples. Each is a place for messages, and one or two texts.

        Raises:
            ConfigError: a text has no tokens.
        """
        iterator = iter(rows)
        while chunk := list(islice(iterator, _BATCH)):
            texts = list(zip(*(texts for _, texts in chunk), strict=True))
            encoded = self._tokenizer(*map(list, texts), truncation=True, max_length=self._max_length, verbose=False)
            types = encoded.get("token_type_ids") if len(texts) > 1 else None
            self._has_types = types is not None
            for i, (location, _) in enumerate(chunk):
                tokens = np.array(encoded["input_ids"][i], np.int64)
                if not len(tokens):
                    raise ConfigError(f"{location}: the text has no tokens. Remove the record.")
                # The second text of a pair is stored as the hidden tokens of the file.
                self._spool.add(location, tokens, None if types is None else np.array(types[i]) == 1)
        self._spool.finish()
        self._bounds = np.append(self._spool.starts, self._spool.count)
        self.token_counts: Array = np.diff(self._bounds)

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> Batch:
        if not 0 <= index < len(self):
            raise IndexError(f"example {index} of {len(self)}")
        start, stop = map(int, self._bounds[index : index + 2])
        rows = {
            "input_ids": self._padded(self._spool.read(start, stop), self._tokenizer.pad_token_id),
            "attention_mask": self._padded(np.ones(stop - start), 0),
            "labels": self._labels[index],
        }
        if self._has_types:
            rows["token_type_ids"] = self._padded(self._spool.hidden(start, stop), 0)
        return rows

    def _padded(self, values: Array, padding: int) -> Tensor:
        row = np.full(self._max_length, padding, np.int64)
        row[: len(values)] = values
        return torch.from_numpy(row)
