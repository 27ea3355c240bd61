"""A small residual network with BatchNorm."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Block(nn.Module):
    """Two 3 x 3 convolutions beside a path that a 1 x 1 convolution adapts where the shape changes.

    Args:
        before: the number of channels of the input.
        after: the number of channels of the output.
        stride: of the first convolution.
        norm: makes the normalization of a number of channels.
    """

    def __init__(self, before: int, after: int, stride: int, norm: Callable[[int], nn.Module] = nn.BatchNorm2d) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, after, 3, stride, 1, bias=False)
        self.norm1 = norm(after)
        self.conv2 = nn.Conv2d(after, after, 3, 1, 1, bias=False)
        self.norm2 = norm(after)
        same = stride == 1 and before == after
        self.path = nn.Identity() if same else nn.Conv2d(before, after, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(y)) + self.path(x))


class ResNet(nn.Module):
    """Three stages of `blocks` blocks, of `width`, 2 x `width` and 4 x `width` channels, for ten classes.

    The first convolution halves the image, so that an image of 28 x 28 has stages of 14, 7 and 4 pixels.
    """

    def __init__(self, width: int, blocks: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, width, 3, 2, 1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        stages = []
        before = width
        for stage in range(3):
            for block in range(blocks):
                stages.append(Block(before, width << stage, 2 if stage and not block else 1))
                before = width << stage
        self.stages = nn.Sequential(*stages)
        self.head = nn.Linear(before, 10)

    def init_weights(self) -> None:
        """Draw new weights from torch's generator."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.BatchNorm2d | nn.Linear):
                module.reset_parameters()

    def forward(self, images: Tensor) -> Tensor:
        """Return logits, (B, 10), of images, float32 (B, 1, 28, 28)."""
        features: Tensor = self.stages(F.relu(self.norm(self.stem(images))))
        logits: Tensor = self.head(features.mean((2, 3)))
        return logits


def shifted(images: Tensor, most: int) -> Tensor:
    """Return images (B, 1, H, W), each flipped or not and shifted by up to `most` pixels at random."""
    count, _, height, width = images.shape
    padded = F.pad(images, (most,) * 4)
    windows = padded.unfold(2, height, 1).unfold(3, width, 1)[:, 0]  # (B, shifts, shifts, H, W)
    down, right = torch.randint(2 * most + 1, (2, count)).to(images.device)  # drawn on the CPU: the same everywhere
    chosen = windows[torch.arange(count, device=images.device), down, right]
    flipped = (torch.rand(count, 1, 1) < 0.5).to(images.device)
    return torch.where(flipped, chosen.flip(-1), chosen)[:, None]
