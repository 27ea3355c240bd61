"""The task `sequence_classification`: a Hugging Face model with a classification head, on labeled text."""

from typing import Any

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from twa_scale.base.inputs import brief
from twa_scale.base.names import nearest, some
from twa_scale.base.paths import path_of
from twa_scale.config import Count, Section
from twa_scale.errors import ConfigError
from twa_scale.run.tasks import huggingface
from twa_scale.run.tasks.classification import (
    TensorExamples,
    classification_metrics,
    cross_entropy,
    integer_labels,
    require_split,
)
from twa_scale.run.tasks.tables import read_columns
from twa_scale.run.tasks.task import SPLITS, Batch, Metrics

Label = str | int


class SequenceClassificationOptions(Section):
    """The options of the task `sequence_classification`."""

    model: str = Field(description="Hugging Face model directory, with its tokenizer.")
    train: str | None = Field(None, description="Training data: a `.csv`, `.tsv` or `.jsonl` file.")
    validation: str | None = Field(None, description="Validation data.")
    test: str | None = Field(None, description="Test data.")
    text: str = Field("text", description="Column of the text.")
    label: str = Field("label", description="Column of the label: integers from 0, or names.")
    num_labels: Count | None = Field(
        None,
        description="Number of classes. By default it follows from the labels or the model's configuration.",
    )
    max_length: Count = Field(128, description="Maximum length in tokens. Longer texts are truncated.")

    @model_validator(mode="after")
    def _some_data(self) -> "SequenceClassificationOptions":
        if not (self.train or self.validation or self.test):
            raise ValueError("give data: at least one of `train`, `validation` and `test`")
        return self


class SequenceClassification:
    """Cross-entropy and accuracy of a text classifier.

    Label names have the numbers of the model's `label2id` if it contains all of them. Otherwise they are numbered in
    sorted order over all files. A split is tokenized at its first access.
    """

    def __init__(self, options: SequenceClassificationOptions) -> None:
        """Read the tables and the model's configuration.

        Raises:
            ConfigError: a file, column, label, model or tokenizer cannot be used.
        """
        self._options = options
        self._paths: dict[str, str] = {s: getattr(options, s) for s in SPLITS if getattr(options, s)}
        columns = {"task.text": options.text, "task.label": options.label}
        tables = {s: read_columns(path_of(p, ConfigError), columns, f"task.{s}") for s, p in self._paths.items()}
        for split, table in tables.items():
            _require_values(table[0], table[1], self._paths[split])
        self._texts = {split: [str(text) for text in table[0]] for split, table in tables.items()}
        config = huggingface.load_config(options.model)
        labels = {split: _numbers(table[1]) for split, table in tables.items()}
        number_of = _numbering(labels, config.label2id)
        self.num_labels = options.num_labels or len(number_of)
        self._labels = {
            split: integer_labels(torch.tensor([number_of[x] for x in column]), self.num_labels, self._paths[split])
            for split, column in labels.items()
        }
        self._tokenizer = _padding_tokenizer(options.model)
        config.num_labels = self.num_labels
        config.pad_token_id = self._tokenizer.pad_token_id
        self._config = config
        self._datasets: dict[str, TensorExamples] = {}

    def model(self) -> nn.Module:
        """Return the Hugging Face model with a head of `num_labels` classes, randomly initialized."""
        return huggingface.build_model("AutoModelForSequenceClassification", self._config)

    def dataset(self, split: str) -> TensorExamples:
        """Return examples {"input_ids", "attention_mask": int64 (max_length,), "labels": int64 scalar}."""
        require_split(split, self._paths)
        if split not in self._datasets:
            encoded = self._tokenizer(
                self._texts[split],
                truncation=True,
                padding="max_length",
                max_length=self._options.max_length,
                return_tensors="pt",
            )
            rows = {key: encoded[key] for key in ("input_ids", "attention_mask")}
            self._datasets[split] = TensorExamples({**rows, "labels": self._labels[split]})
        return self._datasets[split]

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the mean cross-entropy per text, in nats."""
        return cross_entropy(_logits(model, batch), batch["labels"])

    def metrics(self, model: nn.Module, batch: Batch) -> Metrics:
        """Return sums over the texts of `loss` (nats) and `accuracy`."""
        return classification_metrics(_logits(model, batch), batch["labels"])


def _logits(model: nn.Module, batch: Batch) -> Tensor:
    # Columns that are padding in the whole batch are dropped to save time.
    used = batch["attention_mask"].any(0)
    logits: Tensor = model(
        input_ids=batch["input_ids"][:, used], attention_mask=batch["attention_mask"][:, used]
    ).logits
    return logits


def _require_values(texts: list[Any], labels: list[Any], path: str) -> None:
    """Refuse lists as texts, and lists, empty strings and NaN as labels, which would become separate classes."""
    for i, (text, label) in enumerate(zip(texts, labels, strict=True), 1):
        if isinstance(text, list | dict):
            raise ConfigError(f"{path}: example {i}: {brief(text)} is not a text. Write one text for each example.")
        if isinstance(label, list | dict) or label == "" or label != label:
            raise ConfigError(f"{path}: example {i}: {brief(label)} is not a label. Give a name or an integer.")


def _numbers(labels: list[Any]) -> list[Label]:
    """Return labels as integers if all of them are integers, also as text, otherwise as names."""
    try:
        return [int(str(label)) for label in labels]
    except ValueError:
        return [str(label) for label in labels]


def _numbering(labels: dict[str, list[Label]], known: dict[str, int]) -> dict[Label, int]:
    """Return the class number of each label.

    Args:
        labels: the labels of each split.
        known: the `label2id` of the model.
    """
    present = {label for column in labels.values() for label in column}
    if all(isinstance(label, int) for label in present):
        return {i: i for i in {*present, *range(max(int(label) for label in present) + 1)}}
    names = sorted(str(label) for label in present)
    if set(names) <= set(known):
        return {name: known[name] for name in known}
    _refuse_new_labels(labels)
    return {name: number for number, name in enumerate(names)}


def _refuse_new_labels(labels: dict[str, list[Label]]) -> None:
    """Refuse labels that are not in the training data: they are typing errors, or classes new to the candidates."""
    trained = {str(label) for label in labels.get("train", [])}
    for split, column in labels.items():
        new = sorted({str(label) for label in column} - trained)
        if trained and new:
            raise ConfigError(
                f"task.{split}: has the labels {some(new)}, which are not in the training data"
                f"{nearest(new[0], trained) or '.'} Use the same labels in all files."
            )


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
