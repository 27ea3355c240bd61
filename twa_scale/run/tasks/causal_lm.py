"""The task `causal_lm`: next-token prediction on bytes or tokens."""

import math
from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from twa_scale.base.names import nearest
from twa_scale.base.notices import notice
from twa_scale.config import Count, Section
from twa_scale.errors import ConfigError
from twa_scale.run.tasks import huggingface
from twa_scale.run.tasks.adapted import Adapted, build_model, checked
from twa_scale.run.tasks.byte_gpt import VOCABULARY, ByteGPT
from twa_scale.run.tasks.causal_data import Documents, Source, SourceReader, WeightedSource
from twa_scale.run.tasks.data_files import report_shared_files
from twa_scale.run.tasks.isolation import require_isolation, require_positions
from twa_scale.run.tasks.mixture import Mixture
from twa_scale.run.tasks.task import SPLITS, Batch, Examples, Metrics
from twa_scale.run.tasks.tokens import IGNORED, Concatenation, Pieces, Windows


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


class CausalLMOptions(Source, Adapted):
    """The options of the task `causal_lm`."""

    model: ModelChoice = Field(
        default_factory=lambda: ModelChoice(byte_gpt=ByteGPTSizes()),
        description="`byte_gpt`, `{byte_gpt: {n_layer: 5, ...}}`, or the path of a Hugging Face directory.",
    )
    context: Count = Field(256, description="Number of tokens that one example predicts.")
    documents: Documents | None = Field(
        None,
        description="How documents become examples. `joined`: windows over all tokens, which ignore where documents "
        "begin (default for text and tokens). `packed`: the same windows, but the first token of a document is not "
        "predicted. `padded`: each example is from one document, long ones are cut and short ones are padded (default "
        "for chats, which are truncated instead).",
    )
    isolate_documents: bool = Field(
        False,
        description="With `documents: packed` and a Hugging Face model: tokens attend to their own document only, and "
        "positions start at 0 in each document (also called intra-document or block-diagonal attention). The first "
        "batch checks that the model does so; models with recurrent layers do not.",
    )
    sources: list[WeightedSource] = Field(
        [], description="Several sources with their weights: `[{text: ..., weight: 0.7}, {tokens: ..., weight: 0.3}]`."
    )
    recompute_activations: bool = Field(
        False,
        description="Recompute the activations of each block in backward (activation checkpointing): much less memory, "
        "a third more time.",
    )

    @model_validator(mode="after")
    def _one_kind_of_data(self) -> "CausalLMOptions":
        if len(self.kinds) + bool(self.sources) != 1:
            raise ValueError("give exactly one of `text`, `tokens`, `chat` and `sources`")
        if self.isolate_documents and self.documents != "packed":
            raise ValueError(
                f"`isolate_documents` is for `documents: packed`; documents is {self.documents!r}. With `joined` it is "
                "not known where documents begin, and with `padded` each example is from one document"
            )
        if self.isolate_documents and self.model.directory is None:
            raise ValueError("`isolate_documents` is for a Hugging Face model; `byte_gpt` has no positions to set")
        if self.adapter is not None and self.model.directory is None:
            raise ValueError("`adapter` is for a Hugging Face model; `byte_gpt` has none")
        conflicts = sorted(self.model_fields_set & set(Source.model_fields))
        if self.sources and conflicts:
            raise ValueError(f"`{conflicts[0]}` has no effect with `sources`; give it in the sources")
        return self


class CausalLM:
    """Next-token cross-entropy on examples of `context` + 1 tokens.

    Bytes, token files and uncompressed Arrow files of tokens are read on access. Texts for a Hugging Face model, chats,
    and tokens in other records are written to a temporary file of each process, with 4 bytes for each token, at the
    first access to their split.
    """

    def __init__(self, options: CausalLMOptions) -> None:
        """Find the files and read the model's configuration.

        Raises:
            ConfigError: files are missing, the model directory cannot be used, or `context` is too long for the model.
        """
        self._options = options
        self._directory = options.model.directory
        self._adapter = checked(options.adapter)
        self._config = huggingface.load_config(self._directory) if self._directory else None
        text_config = self._config and self._config.get_text_config()
        vocabulary = text_config.vocab_size if text_config else VOCABULARY
        limit = getattr(text_config, "max_position_embeddings", None)
        if limit and options.context > limit:
            raise ConfigError(f"task.context: {options.context} is longer than the model allows. Use at most {limit}.")
        self._vocabulary: int = vocabulary
        self._documents = _documents(options)
        named: dict[str, Source] = {f"task.sources[{i}]": source for i, source in enumerate(options.sources)}
        self._weights = [source.weight for source in options.sources]
        self._readers = [
            SourceReader(source, key, self._directory, vocabulary)
            for key, source in (named or {"task": options}).items()
        ]
        report_shared_files({reader.key: reader.files for reader in self._readers})
        self._datasets: dict[str, Examples] = {}
        self._has_labels = self._is_isolated = False

    def model(self) -> nn.Module:
        """Return the byte-level GPT or the Hugging Face model, randomly initialized, or an adapted one."""
        recompute = self._options.recompute_activations
        if self._config:
            assert self._directory is not None
            model = build_model(
                "AutoModelForCausalLM", self._config, self._directory, self._adapter, recompute=recompute
            )
            if self._options.isolate_documents:
                require_positions(model.get_base_model() if self._adapter else model)  # type: ignore[operator]
            return model
        sizes = self._options.model.byte_gpt
        assert sizes is not None
        return ByteGPT(context=self._options.context, **sizes.model_dump(), recompute=recompute)

    def dataset(self, split: str) -> Examples:
        """Return the examples of a split: {"tokens": int64 (context + 1,)}.

        If not all tokens are predicted, they also have "labels": int64 (context,), the tokens after the first, with
        -100 for tokens that are not predicted. With `isolate_documents` they have "positions": int64 (context,), the
        position of each token except the last in its document.
        """
        if split not in SPLITS:
            raise ConfigError(f"split: {split!r} is not one of {', '.join(SPLITS)}{nearest(split, SPLITS) or '.'}")
        if split not in self._datasets:
            self._datasets[split] = self._examples(split)
        return self._datasets[split]

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the mean cross-entropy per predicted token, in nats."""
        if "labels" not in batch:
            return self._cross_entropy(model, batch, "mean")
        return self._cross_entropy(model, batch, "sum") / (batch["labels"] != IGNORED).sum().clamp(min=1)

    def metrics(self, model: nn.Module, batch: Batch) -> Metrics:
        """Return sums over predicted tokens of `loss` (nats) and, if tokens are bytes, `bits_per_byte`."""
        total = self._cross_entropy(model, batch, "sum")
        count = _num_predicted(batch)
        metrics = {"loss": (total, count)}
        if self._config is None:
            metrics["bits_per_byte"] = (total / math.log(2), count)
        return metrics

    @property
    def terms(self) -> Callable[[Batch], int] | None:
        """Return a function that counts predicted tokens, or None if all tokens of the data are predicted.

        With None, the ranks do not exchange their numbers.
        """
        return _num_predicted if self._has_labels else None

    def _cross_entropy(self, model: nn.Module, batch: Batch, reduction: str) -> Tensor:
        inputs, targets = batch["tokens"][:, :-1], batch.get("labels", batch["tokens"][:, 1:])
        logits = self._logits(model, inputs, batch.get("positions"))
        return F.cross_entropy(
            logits.float().flatten(0, 1), targets.flatten(), reduction=reduction, ignore_index=IGNORED
        )

    def _logits(self, model: nn.Module, inputs: Tensor, positions: Tensor | None) -> Tensor:
        if self._config is None:
            return model(inputs)  # type: ignore[no-any-return]
        if positions is None:
            return model(input_ids=inputs, use_cache=False).logits  # type: ignore[no-any-return]
        if not (self._is_isolated or inputs.is_meta):
            require_isolation(model, self._vocabulary, inputs.device)
            self._is_isolated = True
        return model(input_ids=inputs, position_ids=positions, use_cache=False).logits  # type: ignore[no-any-return]

    def _examples(self, split: str) -> Examples:
        used = [i for i, reader in enumerate(self._readers) if reader.files[split]]
        missing = [reader.key for reader in self._readers if not reader.files[split]]
        if not used:
            total = len({path for reader in self._readers for paths in reader.files.values() for path in paths})
            raise ConfigError(
                f"{missing[0]}, split {split!r}: 0 files of {total}. A list is divided over the splits by whole files: "
                "give more files, or lists for `train`, `validation` and `test`."
            )
        if missing:
            notice(f"{', '.join(missing)}: has no files for the split {split!r}, which consists of the other sources.")
        length = self._options.context + 1
        longest = length if self._documents == "padded" else None
        read = [Concatenation(self._readers[i].sequences(split, longest), self._vocabulary) for i in used]
        labels = self._documents != "joined" or any(tokens.has_hidden for tokens in read)
        self._has_labels |= labels
        examples: list[Examples] = []
        for i, tokens in zip(used, read, strict=True):
            location = f"{self._readers[i].key}, split {split!r}"
            if self._documents == "padded":
                examples.append(Pieces(tokens, length, location))
            else:
                starts = tokens.starts(location) if self._documents == "packed" else None
                positions = self._options.isolate_documents
                examples.append(Windows(tokens, length, location, labels=labels, starts=starts, positions=positions))
        return (
            examples[0] if len(examples) == 1 else Mixture(examples, [self._weights[i] for i in used], "task.sources")
        )


def _num_predicted(batch: Batch) -> int:
    return int((batch["labels"] != IGNORED).sum()) if "labels" in batch else batch["tokens"][:, 1:].numel()


def _documents(options: CausalLMOptions) -> Documents:
    """Return the setting `documents`, or its default, which depends on the kind of data."""
    if options.documents:
        return options.documents
    kinds = {kind for source in (options, *options.sources) for kind in source.kinds}
    if len(kinds) > 1 and "chat" in kinds:
        raise ConfigError(
            "task.documents: is not set, and chats are padded by default, but other data is joined. Set it to padded "
            "or packed for both."
        )
    return "padded" if "chat" in kinds else "joined"
