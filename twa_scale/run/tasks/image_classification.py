"""The task `image_classification`: arrays or image folders, and a model by import path."""

from pathlib import Path
from typing import Any

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from twa_scale.base.inputs import named_errors
from twa_scale.base.paths import path_of
from twa_scale.config import Count, Section
from twa_scale.errors import ConfigError
from twa_scale.run.tasks.classification import TensorExamples, classification_metrics, cross_entropy, require_split
from twa_scale.run.tasks.images import ImageFolder, class_names, read_npz
from twa_scale.run.tasks.import_path import call, import_function
from twa_scale.run.tasks.task import SPLITS, Batch, Examples, Metrics


class ImageClassificationOptions(Section):
    """The options of the task `image_classification`."""

    model: str = Field(description="Import path `package.module:function` of a function that returns the model.")
    model_options: dict[str, Any] = Field({}, description="Keyword arguments of that function.")
    data: str | None = Field(
        None,
        description="All splits at once: an `.npz` file with `train_images`, `train_labels`, ..., or a "
        "folder with `train/CLASS/*`, ... Give this or the splits.",
    )
    train: str | None = Field(
        None, description="Training data: an `.npz` with `images` and `labels`, or a folder of classes."
    )
    validation: str | None = Field(None, description="Validation data.")
    test: str | None = Field(None, description="Test data.")
    image_size: Count | None = Field(None, description="Size of the squares to which images of a folder are cropped.")
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
    """Cross-entropy and accuracy of model(images).

    Examples can have any shape, which they keep. uint8 values are scaled to 0..1. There is no data augmentation,
    because the few coefficients do not overfit.
    """

    def __init__(self, options: ImageClassificationOptions) -> None:
        """Find the data and the model function. A split is read at its first access.

        Raises:
            ConfigError: a path, a folder or the model function cannot be used.
        """
        self._options = options
        self._function = import_function(options.model, "task.model")
        with named_errors(ConfigError):
            self._paths = _paths(options)
        folders = {split: path for split, path in self._paths.items() if path.is_dir()}
        if folders and options.image_size is None:
            raise ConfigError(
                "task.image_size: is not set, but images of a folder are cropped to squares of this size. Set it."
            )
        # All splits share one numbering, even if a split lacks a class.
        self._classes = sorted({name for s, path in folders.items() for name in class_names(path, f"task.{s}")})
        self._datasets: dict[str, Examples] = {}

    def model(self) -> nn.Module:
        """Return the model from the model function.

        Raises:
            ConfigError: the function does not accept the options, or does not return a module.
        """
        model = call(self._function, self._options.model_options, "task.model_options", self._options.model)
        if not isinstance(model, nn.Module):
            raise ConfigError(
                f"task.model: {self._options.model!r} returned {type(model).__name__}, not a torch.nn.Module."
            )
        return model

    def dataset(self, split: str) -> Examples:
        """Return examples {"images": stored shape and dtype, "labels": int64 scalar}."""
        path = require_split(split, self._paths)
        if split not in self._datasets:
            self._datasets[split] = self._read(split, path)
        return self._datasets[split]

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the mean cross-entropy per image, in nats."""
        return cross_entropy(model(self._values(batch)), batch["labels"])

    def metrics(self, model: nn.Module, batch: Batch) -> Metrics:
        """Return sums over the images of `loss` (nats) and `accuracy`."""
        return classification_metrics(model(self._values(batch)), batch["labels"])

    def _values(self, batch: Batch) -> Tensor:
        images = batch["images"]
        values = images.float() / 255 if images.dtype == torch.uint8 else images.float()
        if not self._options.mean:
            return values
        channels = (1, -1) + (1,) * (values.dim() - 2)
        mean, std = (values.new_tensor(of).view(channels) for of in (self._options.mean, self._options.std))
        return (values - mean) / std

    def _read(self, split: str, path: Path) -> Examples:
        if path.is_dir():
            assert self._options.image_size is not None
            return ImageFolder(path, self._classes, self._options.image_size, f"task.{split}")
        images, labels = read_npz(path, f"{split}_" if self._options.data else "", f"task.{split}")
        return TensorExamples({"images": images, "labels": labels})


def _paths(options: ImageClassificationOptions) -> dict[str, Path]:
    if options.data is None:
        named = {split: getattr(options, split) for split in SPLITS}
        paths = {split: path_of(path, ConfigError) for split, path in named.items() if path}
    else:
        root = path_of(options.data, ConfigError)
        paths = {s: root / s for s in SPLITS if (root / s).is_dir()} if root.is_dir() else dict.fromkeys(SPLITS, root)
        if not paths:
            raise ConfigError(f"task.data: {root} has no subfolder {', '.join(SPLITS)}. Set a path for each split.")
    for split, path in paths.items():
        if not path.is_file() and not path.is_dir():
            key = "data" if options.data else split
            raise ConfigError(f"task.{key}: {path} does not exist. Give an .npz file or a folder.")
    return paths
