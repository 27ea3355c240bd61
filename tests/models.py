"""The test model: every kind of tensor that averaging must support, in a few thousand parameters.

A convolution with BatchNorm, two transformer blocks, an embedding tied to the head, a frozen tensor, a parameter
of shape (), and tensors with fewer rows than three ranks.
"""

from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from tests import flattened, meshes, zero

VOCAB, WIDTH, LENGTH, PIXELS, CHANNELS = 11, 8, 5, 6, 3
NUM_CANDIDATES = 4
FROZEN = "stem.gain"
EQUAL = "blocks.0.norm1.bias"  # the same values in every candidate, so that all deltas are zero
TINY = "embed_mix.rows"  # two rows, fewer than three ranks
SCALAR = "embed_mix.scale"
# fully_shard of torch 2.6 cannot shard scalars, and cannot exclude them.
SCALAR_SHAPE: tuple[int, ...] = () if "ignored_params" in signature(fully_shard).parameters else (1,)
PATTERNS = [r"^stem\.", r"^blocks\.\d\.(qkv|out)", r"norm"]  # the group "rest" has the embedding, the mlp and the mix

Batch = dict[str, Tensor]


class Stem(nn.Module):
    """Maps an image to one token."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, CHANNELS, 3, bias=False)
        self.norm = nn.BatchNorm2d(CHANNELS)
        self.gain = nn.Parameter(torch.ones(CHANNELS, 2), requires_grad=False)
        self.project = nn.Linear(CHANNELS * 16, WIDTH)

    def forward(self, image: Tensor) -> Tensor:
        x = torch.tanh(self.norm(self.conv(image))) * self.gain.mean(dim=1)[:, None, None]
        token: Tensor = self.project(x.flatten(1))
        return token


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(WIDTH)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.out = nn.Linear(WIDTH, WIDTH)
        self.norm2 = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 2 * WIDTH)
        self.down = nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (2, -1)).transpose(1, 2) for t in self.qkv(self.norm1(x)).chunk(3, dim=-1))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        x = x + self.out(attended)
        further: Tensor = self.down(F.gelu(self.up(self.norm2(x))))
        return x + further


class Mix(nn.Module):
    """A scalar and a tensor of two rows that weight the image in the text."""

    def __init__(self, scalar_shape: tuple[int, ...]) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(scalar_shape))
        self.rows = nn.Parameter(torch.zeros(2, WIDTH))

    def forward(self, text: Tensor, image: Tensor) -> Tensor:
        return text * self.scale + image[:, None] * (1 + self.rows[0]) + self.rows[1]


class SmallModel(nn.Module):
    """Next-token prediction of a text with an image."""

    def __init__(self, scalar_shape: tuple[int, ...] = SCALAR_SHAPE) -> None:
        super().__init__()
        self.stem = Stem()
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.embed_mix = Mix(scalar_shape)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(WIDTH, VOCAB, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, image: Tensor, tokens: Tensor) -> Tensor:
        x = self.embed_mix(self.embed(tokens), self.stem(image))
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(x)
        return logits


def build(seed: int = 0, scalar_shape: tuple[int, ...] = SCALAR_SHAPE) -> SmallModel:
    """Return the model in float32. The same seed gives the same values on all ranks."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = SmallModel(scalar_shape)
        for name, p in model.named_parameters():
            if p.dim() < 2 or name in (TINY, FROZEN):  # norms and biases do not keep their initial values 0 and 1
                p.data += 0.3 * torch.randn_like(p)
    return model


def candidates(
    n: int = NUM_CANDIDATES, size: float = 0.05, scalar_shape: tuple[int, ...] = SCALAR_SHAPE
) -> list[dict[str, Tensor]]:
    """Return n state dicts around one base. Every tensor but EQUAL differs from it by about `size`, relatively.

    Each candidate has its own amount of noise and of a shared drift: that keeps the eigenvalues of their Gram matrix
    apart.
    """
    base = build(scalar_shape=scalar_shape).state_dict()
    noise = torch.Generator().manual_seed(1)
    drift = {name: torch.randn(value.shape, generator=noise) for name, value in base.items()}
    states: list[dict[str, Tensor]] = []
    for i in range(n):
        state: dict[str, Tensor] = {}
        for name, value in base.items():
            own = torch.randn(value.shape, generator=noise)
            if name == "head.weight":
                state[name] = state["embed.weight"]
            elif name == EQUAL:
                state[name] = value.clone()
            elif not value.is_floating_point():
                state[name] = value + 100 + i
            elif name.endswith("running_var"):
                state[name] = value * (1 + 0.1 * i)
            else:
                spread = value.square().mean().sqrt().clamp(min=0.3) * size
                state[name] = value + spread * ((1 + 0.5 * i) * own + (i - n / 2) * drift[name])
        states.append(state)
    return states


def batch(step: int, size: int = 12) -> Batch:
    """Return the data of one step of all ranks: `size` images (2, 6, 6) and texts of 6 tokens."""
    generator = torch.Generator().manual_seed(1000 + step)
    return {
        "image": torch.randn(size, 2, PIXELS, PIXELS, generator=generator),
        "text": torch.randint(VOCAB, (size, LENGTH + 1), generator=generator),
    }


def part(data: Batch, rank: int, size: int) -> Batch:
    """Return the rows of a batch for rank `rank` of `size`."""
    return {key: value.tensor_split(size)[rank] for key, value in data.items()}


def loss(model: nn.Module, data: Batch) -> Tensor:
    """Return the mean cross entropy over all tokens. Images are cast to the type of the model."""
    dtype = next(p.dtype for p in model.parameters())
    logits = model(data["image"].to(dtype), data["text"][:, :-1])
    return F.cross_entropy(
        logits.flatten(0, 1).to(torch.promote_types(logits.dtype, torch.float32)), data["text"][:, 1:].flatten()
    )


def wrap(model: nn.Module, engine: str, policy: MixedPrecisionPolicy | None = None) -> nn.Module:
    """Wrap the model with an engine: `plain`, `ddp`, `fsdp2`, or one of tests.meshes, tests.zero or tests.flattened.

    FSDP2 cannot shard a parameter of shape (), and the statistics of BatchNorm need float32.
    """
    if engine == "plain":
        return model
    if engine == "ddp":
        return DistributedDataParallel(model)
    if engine in zero.ENGINES:
        stored: nn.Module = zero.wrap(model, engine)
        return stored
    if engine in flattened.ENGINES:
        return flattened.wrap(model, engine)
    assert isinstance(model, SmallModel)
    options: dict[str, Any] = {}
    if engine in meshes.ENGINES:
        mesh = meshes.mesh_of(engine)
        if engine != "hsdp":
            meshes.parallelize(model, mesh[meshes.TP])
        if engine == "tp":
            return model
        options["mesh"] = mesh["pods", "dp"] if engine.startswith("hsdp") else mesh["dp"]
        if engine == "columns-tp":
            options["shard_placement_fn"] = meshes.last_dimension
    if policy is not None:
        options["mp_policy"] = policy
        fully_shard(model.stem.norm, mp_policy=MixedPrecisionPolicy(torch.float32, output_dtype=policy.param_dtype))
    scalars = {p for p in model.parameters() if p.dim() == 0}
    for block in model.blocks:
        fully_shard(block, **options)
    if scalars:
        options["ignored_params"] = scalars
    fully_shard(model, **options)
    return model
