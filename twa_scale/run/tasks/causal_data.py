"""The data of the task `causal_lm`: settings of a source, and its tokens."""

from collections.abc import Iterator, Sequence
from itertools import islice, repeat
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field, model_validator

from twa_scale.base.inputs import brief
from twa_scale.base.notices import notice
from twa_scale.config import Section
from twa_scale.errors import ConfigError
from twa_scale.run.tasks import huggingface
from twa_scale.run.tasks.chat import MARK, ChatEncoder
from twa_scale.run.tasks.data_files import Fractions, SplitFiles, require_text, split_files
from twa_scale.run.tasks.tables import FORMATS, is_table, rows
from twa_scale.run.tasks.token_records import record_tokens
from twa_scale.run.tasks.tokens import Array, Dtype, Spool, TokenFile, Tokens

Documents = Literal["joined", "packed", "padded"]
_KINDS = ("text", "tokens", "chat")
_PLAIN = (".csv", ".tsv", ".json")  # tables that are plain text unless `text_key` is set
_KIND_OF = {  # the kind of data that a setting applies to
    "text_key": "text",
    **dict.fromkeys(("tokens_key", "token_dtype", "document_end"), "tokens"),
    **dict.fromkeys(("messages_key", "chat_template_kwargs"), "chat"),
}
_BATCH = 256  # texts that are tokenized at a time


class Source(Section):
    """Data of one kind: text, tokens or chats."""

    text: SplitFiles | None = Field(
        None,
        description="Text files, globs or directories: one list that is divided by whole files, or `{train: ..., "
        "validation: ..., test: ...}`. `stdlib` is the standard library of Python. Files with one text in each record "
        "(`.jsonl`, `.jsonl.gz`, `.parquet`, `.arrow`) and directories of `datasets.save_to_disk` may be among them. "
        "Give this, `tokens`, `chat` or `sources`.",
    )
    tokens: SplitFiles | None = Field(
        None,
        description="Files of tokens, as for `text`: `.npy` (integers of any dtype, in row-major order), `.bin` (a "
        "plain sequence, a file of llm.c, or one of Megatron-LM with its `.idx`), or records with a list of tokens.",
    )
    chat: SplitFiles | None = Field(
        None,
        description="Files of records with a list of messages, as for `text`. Only the tokens of answers (role "
        "`assistant`) are predicted. The chat template of the model's tokenizer is used.",
    )
    text_key: str | None = Field(
        None,
        description="Column of the text in records; by default `text`. If it is set, `.csv`, `.tsv` and `.json` files "
        "are read as records too, otherwise as plain text.",
    )
    tokens_key: str = Field("input_ids", description="Column of the tokens in records.")
    messages_key: str = Field("messages", description="Column of the messages in records.")
    chat_template_kwargs: dict[str, Any] = Field(
        {},
        description="Further variables of the chat template, such as `{enable_thinking: false}`. The "
        "template must use each of them.",
    )
    token_dtype: Dtype | None = Field(
        None,
        description="Dtype of the tokens in `.bin` files without header and index. The default is `uint16`. The "
        "setting is required if the vocabulary of the model has more than 65536 tokens.",
    )
    document_end: int | None = Field(
        None,
        description="Token that ends each document in `.npy` and plain `.bin` files, so that `documents` can be "
        "`packed` or `padded`.",
    )
    fractions: Fractions = Field(
        default_factory=Fractions, description="Fraction of the files in each split, if one list is divided."
    )
    split_seed: int = Field(0, description="Seed of the division into splits. Use the same for candidates and average.")

    @model_validator(mode="after")
    def _settings_of_the_kind(self) -> "Source":
        for name, kind in _KIND_OF.items():
            unset = getattr(self, name) == type(self).model_fields[name].default
            if self.kinds and kind not in self.kinds and not unset:
                raise ValueError(f"`{name}` is for `{kind}` and has no effect on `{self.kinds[0]}`; remove it")
        return self

    @property
    def kinds(self) -> list[str]:
        """Return the kinds of data that are set."""
        return [kind for kind in _KINDS if getattr(self, kind) is not None]


class WeightedSource(Source):
    """One of several sources: the keys of its data, as above, and its weight."""

    weight: float = Field(
        1.0, gt=0, description="Weight of the source in numbers of examples; weights need not sum to 1."
    )

    @model_validator(mode="after")
    def _one_kind(self) -> "WeightedSource":
        if len(self.kinds) != 1:
            raise ValueError("give exactly one of `text`, `tokens` and `chat` in each source")
        return self


class SourceReader:
    """Finds the files of a source, and reads them as sequences of tokens."""

    def __init__(self, source: Source, key: str, directory: str | None, vocabulary: int) -> None:
        """Find the files of all splits.

        Args:
            source: the settings, with exactly one kind of data.
            key: the section of the settings in error messages.
            directory: the Hugging Face directory of the model, or None if bytes are its tokens.
            vocabulary: the size of the model's vocabulary.

        Raises:
            ConfigError: a path or pattern matches no file.
        """
        self._source, self._directory, self._vocabulary = source, directory, vocabulary
        self._kind = source.kinds[0]
        self._section, self.key = key, f"{key}.{self._kind}"
        suffixes = {"text": ("",), "tokens": (".npy", ".bin", *FORMATS), "chat": FORMATS}[self._kind]
        files: SplitFiles = getattr(source, self._kind)
        self.files = split_files(files, source.fractions, source.split_seed, suffixes, self.key)
        if self._kind == "chat" and directory is None:
            raise ConfigError(
                f"{self.key}: chats need the tokenizer of a Hugging Face directory. Set task.model to one."
            )

    def sequences(self, split: str, longest: int | None) -> list[Tokens]:
        """Return the tokens of the files of a split.

        Args:
            split: one of the splits, which has files.
            longest: the number of tokens to which chats are truncated, or None.

        Raises:
            ConfigError: a file or record cannot be used.
        """
        paths = self.files[split]
        if self._kind == "tokens":
            return self._divided([tokens for path in paths for tokens in self._of_tokens(path)])
        if self._kind == "text":
            for path in paths:
                if not self._holds_records(path):
                    require_text(path)
            if self._directory is None and not any(map(self._holds_records, paths)):
                return [TokenFile.open(path, "uint8").with_one_document() for path in paths]
        spool = Spool(f"{self.key}, split {split!r}", self._vocabulary)
        if self._kind == "chat":
            self._add_chats(paths, spool, longest)
        else:
            self._add_texts(paths, spool)
        spool.finish()
        return [spool]

    def _add_chats(self, paths: Sequence[Path], spool: Spool, longest: int | None) -> None:
        assert self._directory is not None
        encoder = ChatEncoder(
            huggingface.load_tokenizer(self._directory),
            self._directory,
            self._source.chat_template_kwargs,
            f"{self._section}.chat_template_kwargs",
        )
        truncated = unanswered = total = 0
        for location, (messages,) in self._rows(paths, "messages_key", self._source.messages_key):
            tokens, hidden = encoder.encode(messages, location)
            total += 1
            truncated += longest is not None and len(tokens) > longest
            tokens, hidden = tokens[:longest], hidden[:longest]
            if hidden[1:].all():
                unanswered += 1
            else:
                spool.add(location, tokens, hidden)
        if not total:
            raise ConfigError(f"{self.key}: the files hold no chats. Give files with records.")
        if total == unanswered:
            limit = f" in its first {longest} tokens" if longest else ""
            raise ConfigError(
                f"{self.key}: none of {total} chats has a predicted token{limit}. Set a longer task.context."
            )
        if encoder.num_not_found:
            notice(
                f"{self.key}: {encoder.num_not_found} answers are not predicted, because the chat template renders "
                f"them otherwise when messages follow, as it does with thoughts. {MARK} to predict them."
            )
        if truncated:
            notice(
                f"{self.key}: {truncated} of {total} chats are longer than the context and are truncated; {unanswered} "
                "of them are left out, because no token of an answer remains."
            )

    def _add_texts(self, paths: Sequence[Path], spool: Spool) -> None:
        tokenizer = huggingface.load_tokenizer(self._directory) if self._directory else None
        for path in paths:
            texts = self._texts([path]) if self._holds_records(path) else iter([(str(path), _read(path))])
            while chunk := list(islice(texts, _BATCH)):
                for (location, _), tokens in zip(chunk, _tokenize(tokenizer, [text for _, text in chunk]), strict=True):
                    spool.add(location, tokens)

    def _holds_records(self, path: Path) -> bool:
        return is_table(path) and (self._source.text_key is not None or path.suffix.lower() not in _PLAIN)

    def _texts(self, paths: Sequence[Path]) -> Iterator[tuple[str, str]]:
        for location, (text,) in self._rows(paths, "text_key", self._source.text_key or "text"):
            if not isinstance(text, str):
                raise ConfigError(
                    f"{location}: {brief(text)} is not a text. Set {self._section}.text_key to its column."
                )
            if text:
                yield location, text

    def _rows(self, paths: Sequence[Path], setting: str, column: str) -> Iterator[tuple[str, list[Any]]]:
        for path in paths:
            yield from rows(path, {f"{self._section}.{setting}": column}, self.key)

    def _of_tokens(self, path: Path) -> list[Tokens]:
        if is_table(path):
            setting, column = f"{self._section}.tokens_key", self._source.tokens_key
            return record_tokens(path, column, setting, self.key, self._vocabulary)
        return [self._token_file(path)]

    def _divided(self, sequences: list[Tokens]) -> list[Tokens]:
        """Return the sequences. Files of tokens without known documents are divided after each `document_end`."""
        end = self._source.document_end
        if end is None:
            return sequences
        divided = {
            i: file.divided_after(end)
            for i, file in enumerate(sequences)
            if isinstance(file, TokenFile) and file.starts is None
        }
        if divided and not any(map(TokenFile.has_ends, divided.values(), repeat(end))):
            raise ConfigError(
                f"{self._section}.document_end: the token {end} does not occur in {next(iter(divided.values())).path}. "
                "Set it to the end-of-text token of the tokenizer that wrote the files."
            )
        return [divided.get(i, file) for i, file in enumerate(sequences)]

    def _token_file(self, path: Path) -> TokenFile:
        if path.suffix.lower() == ".npy":
            return TokenFile.open_npy(path)
        dtype = self._source.token_dtype
        if path.suffix.lower() != ".bin" and dtype != "uint8":
            raise ConfigError(
                f"{path}: is not a file of tokens, .npy or .bin. Give text files as task.text, or set "
                "task.token_dtype: uint8 if the bytes of the file are the tokens."
            )
        if path.suffix.lower() == ".bin" and (file := TokenFile.open_with_header(path)):
            return file
        if dtype is None and self._vocabulary > 1 << 16:
            raise ConfigError(
                f"{path}: a .bin file has no dtype, and the default uint16 is too small for the vocabulary of "
                f"{self._vocabulary} tokens. Set task.token_dtype: int32, uint32 or int64."
            )
        return TokenFile.open(path, dtype or "uint16")


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"{path}: cannot be read as UTF-8 text: {error}. Convert it or leave it out of task.text."
        ) from error


def _tokenize(tokenizer: Any, texts: list[str]) -> list[Array]:
    """Return the tokens of each text and its end: the end-of-text token of the tokenizer, or a line feed of bytes.

    If the tokenizer adds a beginning-of-text token itself, as those of Llama and Gemma do, each text begins with it.
    """
    if tokenizer is None:
        return [np.frombuffer(text.encode() + b"\n", np.uint8) for text in texts]
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    begin = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    if tokenizer("")["input_ids"][:1] != begin:
        begin = []
    encoded = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    return [np.array(begin + tokens + end, np.int64) for tokens in encoded]
