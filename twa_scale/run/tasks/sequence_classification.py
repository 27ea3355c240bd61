"""The task `sequence_classification`: a Hugging Face model with a head for classes or numbers, on labeled text."""

from collections.abc import Iterator
from itertools import islice
from math import inf
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from twa_scale.base.inputs import brief
from twa_scale.base.names import plural
from twa_scale.config import Count
from twa_scale.errors import ConfigError
from twa_scale.run.tasks import huggingface
from twa_scale.run.tasks.adapted import Adapted, build_model, checked
from twa_scale.run.tasks.classification import classification_metrics, cross_entropy, integer_labels, require_split
from twa_scale.run.tasks.data_files import Paths, table_files
from twa_scale.run.tasks.labels import Label, class_labels, numbering, require_label, require_number
from twa_scale.run.tasks.tables import rows
from twa_scale.run.tasks.task import SPLITS, Batch, Metrics
from twa_scale.run.tasks.text_examples import TextExamples

_KIND = "AutoModelForSequenceClassification"
_LENGTH = 128  # tokens
_POSITIONS = {"position_embeddings", "wpe", "embed_positions", "positions_embed"}
Problem = Literal["classification", "regression"]


class SequenceClassificationOptions(Adapted):
    """The options of the task `sequence_classification`."""

    model: str = Field(description="Hugging Face model directory, with its tokenizer.")
    train: Paths = Field(
        [],
        description="Training data: a `.csv`, `.tsv`, `.jsonl`, `.parquet` or `.arrow` file, a directory of "
        "`datasets.save_to_disk`, a glob, or a list of these.",
    )
    validation: Paths = Field([], description="Validation data.")
    test: Paths = Field([], description="Test data.")
    text: str = Field("text", description="Column of the text.")
    text_pair: str | None = Field(None, description="Column of the second text, for pairs of texts.")
    label: str = Field("label", description="Column of the label: integers from 0, or names; numbers for regression.")
    problem: Problem | None = Field(
        None,
        description="`regression` predicts one number, with the mean squared error as loss. The default is that of the "
        "model's configuration (`problem_type`, or one label), else `classification`.",
    )
    num_labels: Count | None = Field(
        None,
        description="Number of classes. By default it follows from the labels or the model's configuration.",
    )
    max_length: Count | None = Field(
        None,
        description="Maximum length in tokens. Longer texts are truncated. The default is 128, or less if the model "
        "has fewer position embeddings.",
    )

    @model_validator(mode="after")
    def _some_data(self) -> "SequenceClassificationOptions":
        if not (self.train or self.validation or self.test):
            raise ValueError("give data: at least one of `train`, `validation` and `test`")
        return self


class SequenceClassification:
    """Cross-entropy and accuracy of a text classifier, or squared and absolute errors of a regression.

    Label names have the numbers of the model's `label2id` if it contains all of them. Otherwise they are numbered in
    sorted order over all files. A split is tokenized into a temporary file at its first access.
    """

    def __init__(self, options: SequenceClassificationOptions) -> None:
        """Read the tables and the model's configuration.

        Raises:
            ConfigError: a file, column, label, model or tokenizer cannot be used.
        """
        self._options = options
        self._adapter = checked(options.adapter)
        files = {split: getattr(options, split) for split in SPLITS}
        self._files = {s: table_files(paths, f"task.{s}") for s, paths in files.items() if paths}
        config = huggingface.load_config(options.model)
        self.problem = _problem(options, config)
        labels = {split: self._read_labels(split) for split in self._files}
        if self.problem == "regression":
            self.num_labels = 1
            self._labels = {s: torch.tensor([float(label) for label in column]) for s, column in labels.items()}
        else:
            self._labels = self._classes(labels, config)
        self._tokenizer = _padding_tokenizer(options.model)
        config.num_labels = self.num_labels
        config.problem_type = "regression" if self.problem == "regression" else "single_label_classification"
        config.pad_token_id = self._tokenizer.pad_token_id
        self._config = config
        self._length = self._checked_length()
        self._datasets: dict[str, TextExamples] = {}

    def model(self) -> nn.Module:
        """Return the Hugging Face model with a head of `num_labels` outputs, randomly initialized or adapted."""
        return build_model(_KIND, self._config, self._options.model, self._adapter)

    def dataset(self, split: str) -> TextExamples:
        """Return examples {"input_ids", "attention_mask": int64 (length,), "labels": int64 or float32 scalar}.

        Pairs of texts also have "token_type_ids", if the tokenizer returns them.
        """
        require_split(split, self._files)
        if split not in self._datasets:
            vocabulary = getattr(self._config.get_text_config(), "vocab_size", len(self._tokenizer))
            labels = self._labels[split]
            examples = TextExamples(self._tokenizer, vocabulary, self._length, labels, f"task.{split}")
            examples.add((location, [str(text) for text in texts]) for location, texts, _ in self._rows(split))
            self._datasets[split] = examples
        return self._datasets[split]

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the mean cross-entropy per text, in nats, or the mean squared error."""
        outputs = _logits(model, batch)
        if self.problem == "regression":
            return F.mse_loss(outputs.squeeze(-1).float(), batch["labels"])
        return cross_entropy(outputs, batch["labels"])

    def metrics(self, model: nn.Module, batch: Batch) -> Metrics:
        """Return sums over the texts of `loss`, and of `accuracy` or `absolute_error`."""
        outputs, labels = _logits(model, batch), batch["labels"]
        if self.problem == "classification":
            return classification_metrics(outputs, labels)
        errors = outputs.squeeze(-1).float() - labels
        return {"loss": (errors.square().sum(), len(labels)), "absolute_error": (errors.abs().sum(), len(labels))}

    def _checked_length(self) -> int:
        with torch.device("meta"):
            limit = _num_positions(huggingface.build_model(_KIND, self._config))
        length = self._options.max_length
        if length is not None and length > limit:
            raise ConfigError(f"task.max_length: {length} is longer than the model allows. Use at most {limit}.")
        return length or int(min(_LENGTH, limit))

    def _rows(self, split: str) -> Iterator[tuple[str, list[Any], Any]]:
        """Yield the place of each record for messages, its texts and its label."""
        options = self._options
        pair = {} if options.text_pair is None else {"task.text_pair": options.text_pair}
        columns = {"task.text": options.text, **pair, "task.label": options.label}
        for path in self._files[split]:
            for location, (*texts, label) in rows(path, columns, f"task.{split}"):
                yield location, texts, label

    def _read_labels(self, split: str) -> list[Any]:
        """Return the labels of all records, after a check of each record."""
        check = require_number if self.problem == "regression" else require_label
        labels = []
        for location, texts, label in self._rows(split):
            for text in texts:
                if isinstance(text, list | dict):
                    raise ConfigError(f"{location}: {brief(text)} is not a text. Write one text for each example.")
            check(label, location)
            labels.append(label)
        if not labels:
            raise ConfigError(f"task.{split}: {self._files[split][0]} holds no examples.")
        return labels

    def _classes(self, labels: dict[str, list[Any]], config: Any) -> dict[str, Tensor]:
        named: dict[str, list[Label]] = {split: class_labels(column) for split, column in labels.items()}
        number_of = numbering(named, config.label2id)
        if self._options.num_labels is None:
            self._require_known(named, config)
        self.num_labels = self._options.num_labels or len(number_of)
        classes = {split: torch.tensor([number_of[label] for label in column]) for split, column in named.items()}
        return {s: integer_labels(column, self.num_labels, str(self._files[s][0])) for s, column in classes.items()}

    def _require_known(self, named: dict[str, list[Label]], config: Any) -> None:
        """Check that a model with a trained head has an output for each label that is a number."""
        if not any(name.endswith("ForSequenceClassification") for name in config.architectures or ()):
            return
        for split, column in named.items():
            for i, label in enumerate(column):
                if isinstance(label, int) and label >= config.num_labels:
                    location, *_ = next(islice(self._rows(split), i, None))
                    outputs = f"{config.num_labels} {plural(config.num_labels, 'output')}"
                    raise ConfigError(
                        f"{location}: label {label!r}, but the head of {self._options.model!r} has {outputs}. Correct "
                        "the label, or, if the candidates have more classes, set task.num_labels."
                    )


def _num_positions(model: Any) -> float:
    """Return the number of positions of a model with a table of their embeddings; others have no limit."""
    sizes = [inf]
    for name, table in model.named_modules():
        if isinstance(table, nn.Embedding) and name.rpartition(".")[-1] in _POSITIONS:
            first = 0 if table.padding_idx is None else table.padding_idx + 1  # RoBERTa counts from there
            sizes += [table.num_embeddings - first, getattr(model.config, "max_position_embeddings", inf)]
    return min(sizes)


def _logits(model: nn.Module, batch: Batch) -> Tensor:
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    used = batch["attention_mask"].any(0)
    if not used.is_meta:  # Columns that are padding in the whole batch are dropped to save time.
        inputs = {key: value[:, used] for key, value in inputs.items()}
    logits: Tensor = model(**inputs).logits
    return logits


def _problem(options: SequenceClassificationOptions, config: Any) -> Problem:
    """Return the setting `problem`, or that of the model."""
    stored = getattr(config, "problem_type", None)
    if options.problem is None and stored == "multi_label_classification":
        raise ConfigError(
            "task.model: its problem_type is multi_label_classification, which this task does not support. Write a "
            "task of your own, or set task.problem."
        )
    is_single = options.num_labels == 1 or (options.num_labels is None and config.num_labels == 1)
    problem = options.problem or ("regression" if stored == "regression" or is_single else "classification")
    if problem == "regression" and options.num_labels not in (None, 1):
        raise ConfigError(f"task.num_labels: is {options.num_labels}, but regression predicts one number. Remove it.")
    return problem


def _padding_tokenizer(directory: str) -> Any:
    tokenizer = huggingface.load_tokenizer(directory)
    tokenizer.padding_side = "right"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token is None:
        raise ConfigError(
            f"task.model: the tokenizer of {directory!r} has no pad_token and no eos_token. Save it with one."
        )
    return tokenizer
