"""A small vision transformer (arXiv 2010.11929)."""

import math

import torch
from torch import Tensor, nn

from twa_scale.run.tasks.byte_gpt import Block

IMAGE = 28  # pixels in each direction


class ViT(nn.Module):
    """Transformer blocks over the patches of an image, the mean of which is classified into ten classes.

    Args:
        patch: the width of a patch in pixels; divides 28.
        depth: the number of blocks.
        heads: the number of attention heads; divides `width`.
        width: the number of features of a patch.
    """

    def __init__(self, patch: int, depth: int, heads: int, width: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, patch, patch)
        self.positions = nn.Parameter(torch.empty((IMAGE // patch) ** 2, width))
        self.blocks = nn.Sequential(*(Block(width, heads, causal=False) for _ in range(depth)))
        self.norm = nn.LayerNorm(width, bias=False)
        self.head = nn.Linear(width, 10)
        self.init_weights()

    def init_weights(self) -> None:
        """Draw new weights from torch's generator: 1 / sqrt(inputs), and less for the outputs of residual branches."""
        for name, parameter in self.named_parameters():
            if parameter.dim() == 1:
                nn.init.constant_(parameter, 0.0 if name.endswith("bias") else 1.0)
            else:
                branches = 2 * len(self.blocks) if name.endswith("_out.weight") else 1
                nn.init.normal_(parameter, std=1 / math.sqrt(branches * parameter[0].numel()))

    def forward(self, images: Tensor) -> Tensor:
        """Return logits, (B, 10), of images, float32 (B, 1, 28, 28)."""
        features: Tensor = self.patches(images).flatten(2).transpose(1, 2) + self.positions
        logits: Tensor = self.head(self.norm(self.blocks(features)).mean(1))
        return logits
