"""Tokens in the records of parquet, Arrow and JSONL files."""

from pathlib import Path

import numpy as np

from twa_scale.base.inputs import brief, integers
from twa_scale.base.names import quoted
from twa_scale.errors import ConfigError
from twa_scale.run.tasks import arrow, tables
from twa_scale.run.tasks.tokens import IGNORED, Array, Spool, TokenArray, Tokens

_MASK, _LABELS = "attention_mask", "labels"


def record_tokens(path: Path, column: str, setting: str, key: str, vocabulary: int) -> list[Tokens]:
    """Return the tokens of a file whose records have a list of tokens. Each record is a document.

    If records also have lists `attention_mask` and `labels`, tokens with mask 0 are left out, and those with label -100
    are not predicted.

    Args:
        path: the file.
        column: the column of the tokens.
        setting: the setting that names the column.
        key: the setting of the files in error messages.
        vocabulary: the size of the model's vocabulary.

    Returns:
        Views of the file for an Arrow file without compression and without these lists; otherwise, a Spool.

    Raises:
        ConfigError: a file cannot be read, or a record cannot be used.
    """
    is_arrow = path.suffix.lower() in arrow.SUFFIXES
    others = [name for name in (_MASK, _LABELS) if name != column]
    lists = [name for name in others if is_arrow and arrow.has_lists(path, name)]
    if is_arrow and not lists and path.suffix.lower() != arrow.PARQUET and not arrow.is_compressed(path):
        return _views(path, column, setting)
    spool = Spool(str(path), vocabulary)
    if is_arrow:
        _add_rows(path, {setting: column, **{name: name for name in lists}}, spool)
    else:
        _add_lists(path, {setting: column}, others, key, spool)
    spool.finish()
    return [spool]


def _add_lists(path: Path, columns: dict[str, str], others: list[str], key: str, spool: Spool) -> None:
    ((setting, column),) = columns.items()
    of_first: list[str] | None = None
    for location, record in tables.records(path, key):
        arrow.require_columns(location, list(record), columns)
        lists = [name for name in others if isinstance(record.get(name), list)]
        of_first = lists if of_first is None else of_first
        if lists != of_first:
            raise ConfigError(
                f"{location}: has the lists {quoted([column, *lists])}, but the first record has "
                f"{quoted([column, *of_first])}. Give all records the same lists."
            )
        wanted = {setting: column, **{name: name for name in lists}}
        values = {name: _integers(record[name], location, _fix(setting, name)) for setting, name in wanted.items()}
        spool.add(location, *_without_padding(values, location))


def _integers(value: object, location: str, fix: str) -> Array:
    try:
        return np.array(integers(value), np.int64)
    except ValueError:
        raise ConfigError(f"{location}: {brief(value)} is not a list of 64-bit integers. {fix}") from None


def _fix(setting: str, column: str) -> str:
    if setting == column:  # attention_mask or labels
        return f"Correct the values of {column!r}, or remove them."
    return f"Set {setting} to the column of the tokens."


def _views(path: Path, column: str, setting: str) -> list[Tokens]:
    """Return the tokens of each record batch of an Arrow file, which stay in the file."""
    views: list[Tokens] = []
    row = 0
    for batch in arrow.batches(path, {setting: column}):
        tokens, offsets = arrow.integer_lists(batch.column(0), path, row, column, _fix(setting, column))
        starts = np.unique(offsets[:-1])  # without empty documents
        location = f"{path}, rows {row + 1} to {row + batch.num_rows}"
        views.append(TokenArray(tokens, location, starts[starts < len(tokens)].astype(np.int64)))
        row += batch.num_rows
    return views


def _add_rows(path: Path, columns: dict[str, str], spool: Spool) -> None:
    row = 0
    for batch in arrow.batches(path, columns):
        lists = {
            name: arrow.integer_lists(batch.column(i), path, row, name, _fix(setting, name))
            for i, (setting, name) in enumerate(columns.items())
        }
        for i in range(batch.num_rows):
            row += 1
            location = f"{path}, row {row}"
            values = {name: flat[offsets[i] : offsets[i + 1]] for name, (flat, offsets) in lists.items()}
            spool.add(location, *_without_padding(values, location))


def _without_padding(values: dict[str, Array], location: str) -> tuple[Array, Array | None]:
    """Return the tokens of a record that are not padding, and whether each is not predicted."""
    (_, tokens), *others = values.items()
    for name, of_record in others:
        if len(of_record) != len(tokens):
            raise ConfigError(f"{location}: has {len(tokens)} tokens and {len(of_record)} values in column {name!r}.")
    mask, labels = values.get(_MASK), values.get(_LABELS)
    used = np.ones(len(tokens), bool) if mask is None else mask != 0
    if labels is None:
        return tokens[used], None
    hidden = labels == IGNORED
    if (other := used & ~hidden & (labels != tokens)).any():
        at = int(other.argmax())
        raise ConfigError(
            f"{location}: the label {labels[at]} of position {at} is neither its token {tokens[at]} nor {IGNORED}. "
            "Labels must not be shifted: the task does that."
        )
    return tokens[used], hidden[used]
