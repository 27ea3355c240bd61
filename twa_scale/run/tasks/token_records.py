"""Tokens in the records of parquet, Arrow and JSONL files."""

from pathlib import Path

import numpy as np

from twa_scale.base.inputs import brief
from twa_scale.errors import ConfigError
from twa_scale.run.tasks import arrow, tables
from twa_scale.run.tasks.tokens import IGNORED, Array, Spool, TokenArray, Tokens

_MASK, _LABELS = "attention_mask", "labels"


def record_tokens(path: Path, column: str, setting: str, where: str, vocabulary: int) -> list[Tokens]:
    """Return the tokens of a file whose records have a list of tokens. Each record is a document.

    Where records of parquet and Arrow files also have lists `attention_mask` and `labels`, tokens with mask 0 are left
    out, and those with label -100 are not predicted.

    Args:
        path: the file.
        column: the column of the tokens.
        setting: the setting that names the column.
        where: the setting of the files in error messages.
        vocabulary: the size of the model's vocabulary.

    Returns:
        Views of an Arrow file without these lists; otherwise, a Spool.

    Raises:
        ConfigError: a file cannot be read, or a record cannot be used.
    """
    is_arrow = path.suffix.lower() in arrow.SUFFIXES
    lists = [name for name in (_MASK, _LABELS) if is_arrow and name != column and arrow.has_lists(path, name)]
    if is_arrow and not lists and path.suffix.lower() != arrow.PARQUET:
        return _views(path, column, setting)
    spool = Spool(str(path), vocabulary)
    if is_arrow:
        _add_rows(path, {setting: column, **{name: name for name in lists}}, spool)
    else:
        _add_lists(path, {setting: column}, where, spool)
    spool.finish()
    return [spool]


def _add_lists(path: Path, columns: dict[str, str], where: str, spool: Spool) -> None:
    for place, (value,) in tables.rows(path, columns, where):
        if not isinstance(value, list) or not all(type(token) is int for token in value):
            raise ConfigError(
                f"{place}: {brief(value)} is not a list of tokens. Set {next(iter(columns))} to their column."
            )
        spool.add(place, np.array(value, np.int64))


def _views(path: Path, column: str, setting: str) -> list[Tokens]:
    """Return the tokens of each record batch of an Arrow file, which stay in the file."""
    found: list[Tokens] = []
    row = 0
    for batch in arrow.batches(path, {setting: column}):
        tokens, offsets = arrow.integer_lists(batch.column(0), path, row, column, setting)
        starts = np.unique(offsets[:-1])  # without empty documents
        where = f"{path}, rows {row + 1} to {row + batch.num_rows}"
        found.append(TokenArray(tokens, where, starts[starts < len(tokens)].astype(np.int64)))
        row += batch.num_rows
    return found


def _add_rows(path: Path, columns: dict[str, str], spool: Spool) -> None:
    row = 0
    for batch in arrow.batches(path, columns):
        lists = {
            name: arrow.integer_lists(batch.column(i), path, row, name, setting)
            for i, (setting, name) in enumerate(columns.items())
        }
        for i in range(batch.num_rows):
            row += 1
            place = f"{path}, row {row}"
            values = {name: flat[offsets[i] : offsets[i + 1]] for name, (flat, offsets) in lists.items()}
            spool.add(place, *_used(values, place))


def _used(values: dict[str, Array], place: str) -> tuple[Array, Array | None]:
    """Return the tokens of a record that are not padding, and for each whether it is not predicted."""
    (_, tokens), *others = values.items()
    for name, of_record in others:
        if len(of_record) != len(tokens):
            raise ConfigError(f"{place}: has {len(tokens)} tokens and {len(of_record)} values in column {name!r}.")
    mask, labels = values.get(_MASK), values.get(_LABELS)
    used = np.ones(len(tokens), bool) if mask is None else mask != 0
    if labels is None:
        return tokens[used], None
    hidden = labels == IGNORED
    if (other := used & ~hidden & (labels != tokens)).any():
        at = int(other.argmax())
        raise ConfigError(
            f"{place}: the label {labels[at]} of position {at} is neither its token {tokens[at]} nor {IGNORED}. Labels "
            "must not be shifted: the task does that."
        )
    return tokens[used], hidden[used]
