"""The task `image_classification`: a Hugging Face model or one of your own, on arrays, folders, or parquet files."""

from typing import Any

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from twa_scale.base.paths import path_of
from twa_scale.config import Count
from twa_scale.errors import ConfigError
from twa_scale.run.tasks import huggingface
from twa_scale.run.tasks.adapted import Adapted, build_model, checked
from twa_scale.run.tasks.classification import (
    TensorExamples,
    classification_metrics,
    cross_entropy,
    integer_labels,
    require_split,
)
from twa_scale.run.tasks.data_files import Paths
from twa_scale.run.tasks.decoders import Decoder, Processor, Square
from twa_scale.run.tasks.image_data import SplitData, data_of_splits, table_labels
from twa_scale.run.tasks.images import ImageFolder, ImageTable, ProcessedArrays, class_names, read_npz
from twa_scale.run.tasks.import_path import import_function, model_from
from twa_scale.run.tasks.labels import Label, numbering
from twa_scale.run.tasks.task import SPLITS, Batch, Examples, Metrics


class ImageClassificationOptions(Adapted):
    """The options of the task `image_classification`."""

    model: str = Field(
        description="Hugging Face model directory, or import path `package.module:function` of a function that returns "
        "the model."
    )
    model_options: dict[str, Any] = Field({}, description="Keyword arguments of that function.")
    data: str | None = Field(
        None,
        description="All splits at once: an `.npz` file with `train_images`, `train_labels`, ..., or a "
        "folder with `train/CLASS/*`, ... Give this or the splits.",
    )
    train: Paths = Field(
        [],
        description="Training data: an `.npz` with `images` and `labels`, a folder of classes, or `.parquet` and "
        "`.arrow` files, directories of `datasets.save_to_disk` or globs.",
    )
    validation: Paths = Field([], description="Validation data.")
    test: Paths = Field([], description="Test data.")
    image_key: str = Field("image", description="Column of the images in parquet and Arrow files.")
    label_key: str = Field("label", description="Column of the labels there: integers from 0, or names.")
    num_labels: Count | None = Field(
        None, description="Number of classes of a Hugging Face model. By default that of its configuration or the data."
    )
    image_size: Count | None = Field(
        None,
        description="Size of the squares to which images are cropped. Hugging Face models have an image processor: "
        "`image_size`, `mean` and `std` replace it.",
    )
    mean: list[float] = Field([], description="Mean of each channel (first dimension of an example), subtracted.")
    std: list[float] = Field([], description="Standard deviation of each channel; values are divided by it.")

    @model_validator(mode="after")
    def _data_once(self) -> "ImageClassificationOptions":
        if bool(self.data) == bool(self.train or self.validation or self.test):
            raise ValueError("give either `data` for all splits, or `train`, `validation` and `test`")
        if len(self.mean) != len(self.std) or 0 in self.std:
            raise ValueError("give `mean` and `std` together, one number for each channel, no `std` of 0")
        return self


class ImageClassification:
    """Cross-entropy and accuracy of model(images), or of the `logits` of its output.

    Images of files go through the image processor of a Hugging Face directory; those of another model are cropped to
    squares. Arrays can have any shape, which they keep without an image processor. uint8 values are scaled to 0..1.
    There is no data augmentation, because the few coefficients do not overfit.

    Class names have the numbers of the model's `label2id` if it contains all of them. Otherwise they are numbered in
    sorted order over all splits.
    """

    def __init__(self, options: ImageClassificationOptions) -> None:
        """Find the data and the model. Labels are read, and images only when they are accessed.

        Raises:
            ConfigError: a path, a folder, a label, or the model cannot be used.
        """
        self._options = options
        self._directory = _directory(options.model)
        self._adapter = checked(options.adapter)
        if self._adapter and not self._directory:
            raise ConfigError("task.adapter: needs a Hugging Face directory. A model function can return such a model.")
        self._function = None if self._directory else import_function(options.model, "task.model")
        self._data = data_of_splits(options.data, {split: getattr(options, split) for split in SPLITS})
        self._config = huggingface.load_config(self._directory) if self._directory else None
        self._decoder = self._make_decoder()
        known: dict[str, int] = self._config.label2id if self._config else {}
        labels = {split: self._labels_of(data, known) for split, data in self._data.items() if data.kind != "arrays"}
        self._number_of = numbering(labels, known) if labels else {}
        self._labels = {s: torch.tensor([self._number_of[label] for label in column]) for s, column in labels.items()}
        if self._config:
            self._config.num_labels = options.num_labels or max(self._config.num_labels, len(self._number_of))
            for split, column in self._labels.items():
                integer_labels(column, self._config.num_labels, self._data[split].key)
        self._datasets: dict[str, Examples] = {}

    def model(self) -> nn.Module:
        """Return the Hugging Face model, randomly initialized or adapted, or the model from the model function.

        Raises:
            ConfigError: the function does not accept the options, or does not return a module.
        """
        if self._config:
            return build_model("AutoModelForImageClassification", self._config, self._options.model, self._adapter)
        assert self._function is not None
        return model_from(self._function, self._options.model_options, self._options.model)

    def dataset(self, split: str) -> Examples:
        """Return examples {"images": pixel values of the image processor, or stored values, "labels": int64 scalar}."""
        data = require_split(split, self._data)
        if split not in self._datasets:
            self._datasets[split] = self._read(split, data)
        return self._datasets[split]

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the mean cross-entropy per image, in nats."""
        return cross_entropy(self._logits(model, batch), batch["labels"])

    def metrics(self, model: nn.Module, batch: Batch) -> Metrics:
        """Return sums over the images of `loss` (nats) and `accuracy`."""
        return classification_metrics(self._logits(model, batch), batch["labels"])

    def _logits(self, model: nn.Module, batch: Batch) -> Tensor:
        values = self._values(batch["images"])
        output = model(pixel_values=values) if self._config else model(values)
        logits: Tensor = output if isinstance(output, Tensor) else getattr(output, "logits", output)
        if not isinstance(logits, Tensor):
            raise ConfigError(
                f"task.model: the model returned {type(output).__name__}, neither logits nor an object with `logits`. "
                "Return one of these."
            )
        return logits

    def _values(self, images: Tensor) -> Tensor:
        values = images.float() / 255 if images.dtype == torch.uint8 else images.float()
        if not self._options.mean:
            return values
        channels = (1, -1) + (1,) * (values.dim() - 2)
        mean, std = (values.new_tensor(of).view(channels) for of in (self._options.mean, self._options.std))
        return (values - mean) / std

    def _make_decoder(self) -> Decoder | None:
        """Return the decoder of images, or None if there are only arrays that are used as they are."""
        has_settings = self._options.image_size is not None or bool(self._options.mean)
        if self._directory and not has_settings:
            return Processor(self._directory)
        if all(data.kind == "arrays" for data in self._data.values()):
            return None
        if self._options.image_size is None:
            raise ConfigError(
                "task.image_size: is not set, but images of files are cropped to squares of this size. Set it."
            )
        return Square(self._options.image_size)

    def _labels_of(self, data: SplitData, known: dict[str, int]) -> list[Label]:
        """Return the labels of the rows of a table, or the names of the classes of a folder."""
        if data.kind == "table":
            return table_labels(data.paths, self._options.label_key, known)
        return list(class_names(data.paths[0], data.key))

    def _read(self, split: str, data: SplitData) -> Examples:
        path = data.paths[0]
        if data.kind == "arrays":
            images, labels = read_npz(path, f"{split}_" if self._options.data else "", f"task.{split}")
            if self._config:
                integer_labels(labels, self._config.num_labels, f"task.{split}: {path}")
            if self._decoder:
                return ProcessedArrays(images, labels, self._decoder, str(path))
            return TensorExamples({"images": images, "labels": labels})
        assert self._decoder is not None
        if data.kind == "table":
            return ImageTable(data.paths, self._options.image_key, self._labels[split], self._decoder)
        classes = {str(name): number for name, number in self._number_of.items()}
        return ImageFolder(path, classes, self._decoder, data.key)


def _directory(model: str) -> str | None:
    """Return the Hugging Face directory that `model` names, or None if it is an import path.

    Raises:
        ConfigError: `model` is neither.
    """
    path = path_of(model, ConfigError)
    if ":" in model and not path.is_dir():
        return None
    if not path.is_dir():
        raise ConfigError(
            f"task.model: {model!r} is neither a Hugging Face model directory on disk nor an import path "
            "package.module:function."
        )
    return model
