"""A small transformer that reads bytes: the model of the quickstart."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

VOCABULARY = 256


class Block(nn.Module):
    """Causal attention and a feed-forward layer, each behind its norm (Xiong et al., arXiv 2002.04745)."""

    def __init__(self, d_model: int, n_head: int) -> None:
        super().__init__()
        self.n_head = n_head
        self.attention_norm = nn.LayerNorm(d_model, bias=False)
        self.attention_in = nn.Linear(d_model, 3 * d_model, bias=False)
        self.attention_out = nn.Linear(d_model, d_model, bias=False)
        self.mlp_norm = nn.LayerNorm(d_model, bias=False)
        self.mlp_in = nn.Linear(d_model, 4 * d_model, bias=False)
        self.mlp_out = nn.Linear(4 * d_model, d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, T, d_model) to the same shape."""
        x = x + self._attend(self.attention_norm(x))
        hidden = F.gelu(self.mlp_in(self.mlp_norm(x)), approximate="tanh")
        out: Tensor = x + self.mlp_out(hidden)
        return out

    def _attend(self, x: Tensor) -> Tensor:
        heads = self.attention_in(x).unflatten(-1, (3, self.n_head, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(heads[0], heads[1], heads[2], is_causal=True)
        out: Tensor = self.attention_out(mixed.transpose(1, 2).flatten(2))
        return out


class ByteGPT(nn.Module):
    """Decoder over bytes with learned positions; the output layer is the embedding itself.

    It has no buffers, so that it can be built on the meta device and filled from candidates.

    Args:
        context: Longest sequence, in bytes.
        n_layer: Number of blocks.
        n_head: Attention heads per block; divides d_model.
        d_model: Width.
        recompute: Whether training keeps only the input of each block for backward.
    """

    def __init__(
        self, context: int = 256, n_layer: int = 5, n_head: int = 4, d_model: int = 128, *, recompute: bool = False
    ) -> None:
        super().__init__()
        self.recompute = recompute
        self.embedding = nn.Embedding(VOCABULARY, d_model)
        self.positions = nn.Embedding(context, d_model)
        self.blocks = nn.ModuleList(Block(d_model, n_head) for _ in range(n_layer))
        self.norm = nn.LayerNorm(d_model, bias=False)
        self.init_weights()

    def init_weights(self) -> None:
        """Draw the weights anew: deviation 0.02, less where blocks add to the residual stream (GPT-2)."""
        for name, parameter in self.named_parameters():
            if parameter.dim() == 1:
                nn.init.ones_(parameter)
            else:
                adds = name.endswith("_out.weight")
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * len(self.blocks)) if adds else 0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map tokens (B, T), int64 in 0..255, to logits (B, T, 256) of the byte that follows each."""
        x = self.embedding(tokens) + self.positions(torch.arange(tokens.shape[1], device=tokens.device))
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.recompute and self.training else block(x)
        return F.linear(self.norm(x), self.embedding.weight)
