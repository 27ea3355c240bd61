"""The task of a run on Fashion-MNIST: like `image_classification`, with augmentation while weights are trained."""

from torch import Tensor, nn

from examples.proof.images.network import ResNet, shifted
from twa_scale.run.tasks import Batch
from twa_scale.run.tasks.classification import cross_entropy
from twa_scale.run.tasks.image_classification import ImageClassification, ImageClassificationOptions

MEAN, STD = 0.286, 0.353  # of the pixels of the training set


class Clothes(ImageClassification):
    """Cross-entropy and accuracy of images that are flipped and shifted in training."""

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the mean cross-entropy per image, in nats. A model in evaluation mode gets the images as they are."""
        images = self.inputs(batch)
        return cross_entropy(model(shifted(images, 2) if model.training else images), batch["labels"])

    def inputs(self, batch: Batch) -> Tensor:
        """Return what the model gets of a batch in evaluation mode, float32 (B, 1, 28, 28)."""
        return self._values(batch)


def clothes(data: dict[str, str], network: dict[str, int]) -> Clothes:
    """Return the task for `task.name`: the files of `data` by split, and the arguments of the network."""
    options = {"model": f"{__name__}:resnet", "model_options": network, "mean": [MEAN], "std": [STD], **data}
    return Clothes(ImageClassificationOptions.model_validate(options))


def resnet(width: int, blocks: int) -> nn.Module:
    """Return the model of a run."""
    return ResNet(width, blocks)
