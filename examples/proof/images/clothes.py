"""The task of a run on Fashion-MNIST: images are flipped and shifted while weights or coefficients are trained."""

from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn

from examples.proof.images.network import shifted
from twa_scale.run.tasks import Batch, Examples, Metrics
from twa_scale.run.tasks.classification import TensorExamples, classification_metrics, cross_entropy
from twa_scale.run.tasks.images import read_npz
from twa_scale.run.tasks.import_path import import_function, model_from

MEAN, STD = 0.286, 0.353  # of the pixels of the training set


class Clothes:
    """Cross-entropy and accuracy of a classifier.

    Args:
        data: an .npz file for each split, with `images`, uint8 (N, 1, 28, 28), and `labels`, int64 (N,).
        network: the arguments of the class of the network.
        architecture: the import path of this class.
    """

    def __init__(
        self, data: dict[str, str], network: dict[str, int], architecture: str = "examples.proof.images.network:ResNet"
    ) -> None:
        self._data = data
        self._network = network
        self._architecture = architecture
        self.dataset = cache(self._read)

    def model(self) -> nn.Module:
        kind = import_function(self._architecture, "task.architecture")
        return model_from(kind, self._network, self._architecture)

    def _read(self, split: str) -> Examples:
        images, labels = read_npz(Path(self._data[split]), "", f"task.data.{split}")
        return TensorExamples({"images": images, "labels": labels})

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the mean cross-entropy per image, in nats. A model in evaluation mode gets the images as they are."""
        images = self.inputs(batch)
        return cross_entropy(model(shifted(images, 2) if model.training else images), batch["labels"])

    def metrics(self, model: nn.Module, batch: Batch) -> Metrics:
        """Return sums over the images of `loss` (nats) and `accuracy`."""
        return classification_metrics(model(self.inputs(batch)), batch["labels"])

    def inputs(self, batch: Batch) -> Tensor:
        """Return what the model gets of a batch in evaluation mode, float32 (B, 1, 28, 28)."""
        return (batch["images"].to(torch.float32) / 255 - MEAN) / STD
