"""A small detector of objects by their centers, like CenterNet (arXiv 1904.07850)."""

from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from examples.proof.detection.loss import detection_loss
from examples.proof.images.network import Block

NO_OBJECT_LOGIT = 1e4  # the logit of "no object" where another cell next to it is more certain


@dataclass
class DetectorOutput:
    """What a detector returns, as models of transformers do. Q cells, row by row, each stand for one object."""

    loss: Tensor | None
    logits: Tensor
    """(B, Q, C + 1); the last class means that there is no object."""
    pred_boxes: Tensor
    """(B, Q, 4): center, width and height as fractions of the image."""


class Detector(nn.Module):
    """Classifies each cell of 4 x 4 pixels as the center of an object or not, and predicts the box of this object.

    Features of cells of 4, 8 and 16 pixels are added, as in a feature pyramid.

    Args:
        width: the number of channels of the first convolution.
        num_classes: the number C of classes.
    """

    def __init__(self, width: int, num_classes: int) -> None:
        super().__init__()
        norm = partial(nn.GroupNorm, 4)
        self.stem = nn.Sequential(nn.Conv2d(1, width, 3, 2, 1, bias=False), norm(width), nn.ReLU())
        self.levels = nn.ModuleList(
            nn.Sequential(Block(width << i, width << i + 1, 2, norm), Block(width << i + 1, width << i + 1, 1, norm))
            for i in range(3)
        )
        self.sides = nn.ModuleList(nn.Conv2d(width << i + 1, 4 * width, 1) for i in range(3))
        self.mixed = nn.Sequential(nn.Conv2d(4 * width, 4 * width, 3, 1, 1, bias=False), norm(4 * width), nn.ReLU())
        self.classes = nn.Conv2d(4 * width, num_classes + 1, 1)
        self.boxes = nn.Conv2d(4 * width, 4, 1)
        self.init_weights()

    def init_weights(self) -> None:
        """Draw new weights from torch's generator. At first there is an object in one cell of a hundred."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.GroupNorm):
                module.reset_parameters()
        for head in (self.classes, self.boxes):
            assert head.bias is not None
            nn.init.zeros_(head.bias)
            if head is self.classes:
                nn.init.constant_(head.bias[-1], 7.0)

    def forward(self, pixel_values: Tensor, labels: list[dict[str, Tensor]] | None = None) -> DetectorOutput:
        """Return the objects, and the loss if there are labels.

        Args:
            pixel_values: float32 (B, 3, H, W) from 0 to 1, of which the first channel is seen.
            labels: for each image, `class_labels`, int64 (M,), and `boxes`, (M, 4) as of `DetectorOutput`.
        """
        x = self.stem(2 * pixel_values[:, :1] - 1)
        found = [x := level(x) for level in self.levels]
        features = self.sides[-1](found[-1])
        for side, level in zip(reversed(self.sides[:-1]), reversed(found[:-1]), strict=True):
            features = side(level) + F.interpolate(features, scale_factor=2.0)
        features = self.mixed(F.relu(features))
        logits, boxes = self.classes(features).movedim(1, -1), decode_boxes(self.boxes(features).movedim(1, -1))
        loss = None if labels is None else detection_loss(logits, boxes, labels)
        return DetectorOutput(loss, suppress_non_maxima(logits).flatten(1, 2), boxes.flatten(1, 2))


def decode_boxes(offsets: Tensor) -> Tensor:
    """Return boxes, as of `DetectorOutput`, from what a detector predicts in each cell.

    Args:
        offsets: (B, rows, columns, 4): the distance from the center of the cell to that of the object in cells, and the
            logarithm of its size, with a quarter of the image as the unit.
    """
    rows, columns = offsets.shape[1:3]
    places = torch.stack(torch.meshgrid(torch.arange(columns), torch.arange(rows), indexing="xy"), -1) + 0.5
    centers = (places.to(offsets) + offsets[..., :2]) / offsets.new_tensor([columns, rows])
    return torch.cat([centers, offsets[..., 2:].clamp(-4, 2).exp() / 4], -1)


def suppress_non_maxima(logits: Tensor) -> Tensor:
    """Return logits, (B, rows, columns, C + 1), with an object only where no cell next to it is more certain."""
    certain = logits.softmax(-1)[..., :-1].amax(-1)
    kept = certain == F.max_pool2d(certain[:, None], 3, 1, 1)[:, 0]
    return torch.cat([logits[..., :-1], logits[..., -1:].where(kept[..., None], NO_OBJECT_LOGIT)], -1)
