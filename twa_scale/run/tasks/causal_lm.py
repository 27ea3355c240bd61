"""The task `causal_lm`: next-token prediction on bytes or tokens."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from twa_scale.base.names import nearest
from twa_scale.config import Count, Section
from twa_scale.errors import ConfigError
from twa_scale.run.tasks import huggingface
from twa_scale.run.tasks.byte_gpt import VOCABULARY, ByteGPT
from twa_scale.run.tasks.data_files import Fractions, SplitFiles, require_text, split_files
from twa_scale.run.tasks.task import SPLITS, Batch, Metrics
from twa_scale.run.tasks.tokens import Dtype, TokenArray, TokenFile, Tokens, Windows


class ByteGPTSizes(Section):
    """Sizes of the built-in model; about a million parameters by default."""

    n_layer: Count = Field(5, description="Number of blocks.")
    n_head: Count = Field(4, description="Attention heads per block.")
    d_model: Count = Field(128, description="Width; a multiple of `n_head`.")

    @model_validator(mode="after")
    def _heads_divide_width(self) -> "ByteGPTSizes":
        if self.d_model % self.n_head:
            raise ValueError(f"d_model {self.d_model} is not a multiple of n_head {self.n_head}")
        return self


class ModelChoice(Section):
    """The built-in byte-level GPT, or a Hugging Face directory."""

    byte_gpt: ByteGPTSizes | None = Field(None, description="The built-in model, with these sizes.")
    directory: str | None = Field(None, description="Hugging Face model directory. A plain string means this.")

    @model_validator(mode="before")
    @classmethod
    def _short_forms(cls, value: Any) -> Any:
        if value == "byte_gpt":
            return {"byte_gpt": {}}
        return {"directory": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _one(self) -> "ModelChoice":
        if (self.byte_gpt is None) == (self.directory is None):
            raise ValueError("give `byte_gpt` with its sizes, or the path of a Hugging Face directory")
        return self


class CausalLMOptions(Section):
    """The options of the task `causal_lm`."""

    model: ModelChoice = Field(
        default_factory=lambda: ModelChoice(byte_gpt=ByteGPTSizes()),
        description="`byte_gpt`, `{byte_gpt: {n_layer: 5, ...}}`, or the path of a Hugging Face directory.",
    )
    text: SplitFiles | None = Field(
        None,
        description="Text files, globs or directories: one list that is divided by whole files, or `{train: ..., "
        "validation: ..., test: ...}`. `stdlib` is the standard library of Python. Give this or `tokens`.",
    )
    tokens: SplitFiles | None = Field(
        None,
        description="Files of tokens, as for `text`: `.npy` (integers of any dtype, in row-major order) or `.bin` (a "
        "plain sequence without a header). Give this or `text`.",
    )
    token_dtype: Dtype | None = Field(
        None,
        description="Dtype of the tokens in `.bin` files. The default is `uint16`. The setting is required if the "
        "vocabulary of the model has more than 65536 tokens.",
    )
    context: Count = Field(256, description="Number of tokens that one example predicts.")
    fractions: Fractions = Field(
        default_factory=Fractions, description="Fraction of the files in each split, if one list is divided."
    )
    split_seed: int = Field(0, description="Seed of that division. Use the same for candidates and average.")
    recompute_activations: bool = Field(
        False,
        description="Recompute the activations of each block in backward (activation checkpointing): much less memory, "
        "a third more time.",
    )

    @model_validator(mode="after")
    def _one_kind_of_data(self) -> "CausalLMOptions":
        if (self.text is None) == (self.tokens is None):
            raise ValueError("give exactly one of `text` and `tokens`")
        return self


class CausalLM:
    """Next-token cross-entropy on disjoint windows of `context` + 1 tokens.

    Bytes and token files are read on access. Text for a Hugging Face model is tokenized in memory at the first access
    to its split, so a large corpus should be given as token files.
    """

    def __init__(self, options: CausalLMOptions) -> None:
        """Find the files and read the model's configuration.

        Raises:
            ConfigError: files are missing, the model directory cannot be used, or `context` is too long for the model.
        """
        self._options = options
        self._directory = options.model.directory
        self._config = huggingface.load_config(self._directory) if self._directory else None
        self._vocabulary = self._config.vocab_size if self._config else VOCABULARY
        limit = getattr(self._config, "max_position_embeddings", None)
        if limit and options.context > limit:
            raise ConfigError(f"task.context: {options.context} is longer than the model allows. Use at most {limit}.")
        self._key = "task.text" if options.text else "task.tokens"
        files = options.text or options.tokens
        assert files is not None
        suffixes = ("",) if options.text else (".npy", ".bin")
        self._files = split_files(files, options.fractions, options.split_seed, suffixes, self._key)
        self._datasets: dict[str, Windows] = {}

    def model(self) -> nn.Module:
        """Return the byte-level GPT or the Hugging Face model, randomly initialized."""
        recompute = self._options.recompute_activations
        if self._config:
            return huggingface.build_model("AutoModelForCausalLM", self._config, recompute=recompute)
        sizes = self._options.model.byte_gpt
        assert sizes is not None
        return ByteGPT(context=self._options.context, **sizes.model_dump(), recompute=recompute)

    def dataset(self, split: str) -> Windows:
        """Return the windows of a split: {"tokens": int64 (context + 1,)}."""
        if split not in self._files:
            raise ConfigError(f"split: {split!r} is not one of {', '.join(SPLITS)}{nearest(split, SPLITS) or '.'}")
        if split not in self._datasets:
            where = f"{self._key}, split {split!r}"
            if not self._files[split]:
                total = len({path for paths in self._files.values() for path in paths})
                raise ConfigError(
                    f"{where}: 0 files of {total}. A list is divided over the splits by whole files: give more files, "
                    "or lists for `train`, `validation` and `test`."
                )
            sequences = self._sequences(self._files[split])
            self._datasets[split] = Windows(sequences, self._options.context + 1, self._vocabulary, where)
        return self._datasets[split]

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the mean cross-entropy per predicted token, in nats."""
        return self._cross_entropy(model, batch, "mean")

    def metrics(self, model: nn.Module, batch: Batch) -> Metrics:
        """Return sums over predicted tokens of `loss` (nats) and, if tokens are bytes, `bits_per_byte`."""
        total = self._cross_entropy(model, batch, "sum")
        count = batch["tokens"][:, 1:].numel()
        metrics = {"loss": (total, count)}
        if self._config is None:
            metrics["bits_per_byte"] = (total / math.log(2), count)
        return metrics

    def _cross_entropy(self, model: nn.Module, batch: Batch, reduction: str) -> Tensor:
        inputs, targets = batch["tokens"][:, :-1], batch["tokens"][:, 1:]
        logits = model(input_ids=inputs, use_cache=False).logits if self._config else model(inputs)
        return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction=reduction)

    def _sequences(self, paths: list[Path]) -> list[Tokens]:
        if self._options.tokens:
            return [self._token_file(path) for path in paths]
        for path in paths:
            require_text(path)
        if self._directory is None:
            return [TokenFile.open(path, "uint8") for path in paths]
        tokenizer = huggingface.load_tokenizer(self._directory)
        return [TokenArray(_tokenize(tokenizer, path), str(path)) for path in paths]

    def _token_file(self, path: Path) -> TokenFile:
        if path.suffix.lower() == ".npy":
            return TokenFile.open_npy(path)
        dtype = self._options.token_dtype
        if path.suffix.lower() != ".bin" and dtype != "uint8":
            raise ConfigError(
                f"{path}: is not a file of tokens, .npy or .bin. Give text files as task.text, or set "
                "task.token_dtype: uint8 if the bytes of the file are the tokens."
            )
        if dtype is None and self._vocabulary > 1 << 16:
            raise ConfigError(
                f"{path}: a .bin file has no dtype, and the default uint16 is too small for the vocabulary of "
                f"{self._vocabulary} tokens. Set task.token_dtype: int32, uint32 or int64."
            )
        return TokenFile.open(path, dtype or "uint16")


def _tokenize(tokenizer: Any, path: Path) -> "np.ndarray[Any, np.dtype[np.int32]]":
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"{path}: cannot be read as UTF-8 text: {error}. Convert it or leave it out of task.text."
        ) from error
    tokens = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    return np.array(tokens + end, dtype=np.int32)
