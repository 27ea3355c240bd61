"""A small byte-level transformer, the model of the quickstart."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

VOCABULARY = 256


class Block(nn.Module):
    """A transformer block with pre-layer normalization (Xiong et al., arXiv 2002.04745).

    Args:
        d_model: the width.
        n_head: the number of attention heads; divides `d_model`.
        causal: whether a position attends only to itself and to those before it.
    """

    def __init__(self, d_model: int, n_head: int, causal: bool = True) -> None:
        super().__init__()
        self.n_head, self.causal = n_head, causal
        self.attention_norm = nn.LayerNorm(d_model, bias=False)
        self.attention_in = nn.Linear(d_model, 3 * d_model, bias=False)
        self.attention_out = nn.Linear(d_model, d_model, bias=False)
        self.mlp_norm = nn.LayerNorm(d_model, bias=False)
        self.mlp_in = nn.Linear(d_model, 4 * d_model, bias=False)
        self.mlp_out = nn.Linear(4 * d_model, d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return the output of the block, of shape (B, T, d_model), for an input of the same shape."""
        x = x + self._attend(self.attention_norm(x))
        hidden = F.gelu(self.mlp_in(self.mlp_norm(x)), approximate="tanh")
        out: Tensor = x + self.mlp_out(hidden)
        return out

    def _attend(self, x: Tensor) -> Tensor:
        heads = self.attention_in(x).unflatten(-1, (3, self.n_head, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(heads[0], heads[1], heads[2], is_causal=self.causal)
        out: Tensor = self.attention_out(mixed.transpose(1, 2).flatten(2))
        return out


class ByteGPT(nn.Module):
    """A decoder-only transformer over bytes with learned positions and a tied output layer.

    It has no buffers, so it can be constructed on the meta device and filled from candidates.

    Args:
        context: the length of the longest sequence, in bytes.
        n_layer: the number of blocks.
        n_head: the number of attention heads per block; divides `d_model`.
        d_model: the width.
        recompute: whether blocks recompute their activations in backward (activation checkpointing).
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
        """Initialize the weights as GPT-2: standard deviation 0.02, smaller for the outputs of residual branches."""
        for name, parameter in self.named_parameters():
            if parameter.dim() == 1:
                nn.init.ones_(parameter)
            else:
                adds = name.endswith("_out.weight")
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * len(self.blocks)) if adds else 0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the logits (B, T, 256) of the next byte for each of the tokens (B, T), int64 in 0..255."""
        x = self.embedding(tokens) + self.positions(torch.arange(tokens.shape[1], device=tokens.device))
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.recompute and self.training else block(x)
        return F.linear(self.norm(x), self.embedding.weight)
