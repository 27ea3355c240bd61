"""A Llama of random weights and candidates around it, tensor by tensor: no more than a few of one are in memory.

Candidate i is base + lowrank_i * U_i V_i^T + noise_i * t, rounded to bfloat16. The amounts are its own; t are Student-t
numbers (3 degrees of freedom), whose tails are as heavy as those of real deltas.
"""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from twa_scale.base.spans import whole_tensor
from twa_scale.output import TensorSpec, writing
from twa_scale.ranks import Group

SIZES = {
    "100m": {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 9, "tie_word_embeddings": True},
    "1b": {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 24, "tie_word_embeddings": False},
}
HEAD, KEY_VALUE_HEADS = 64, 8
BASE = 0.02  # standard deviation of a matrix, as transformers sets it
AMOUNT = 0.1  # of deltas, in units of it
RANK = 4


def llama(size: str) -> LlamaConfig:
    """Return the configuration of a Llama that reads bytes: nearly all parameters are in its blocks."""
    sizes = SIZES[size]
    return LlamaConfig(
        vocab_size=256,
        num_attention_heads=sizes["hidden_size"] // HEAD,
        num_key_value_heads=KEY_VALUE_HEADS,
        max_position_embeddings=4096,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
        **sizes,
    )


def tensors(config: LlamaConfig) -> list[TensorSpec]:
    """Return what a checkpoint of the model holds, tied weights once."""
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    return [TensorSpec(name, tuple(p.shape), torch.bfloat16) for name, p in model.named_parameters()]


def link_candidates(directory: Path, m: int, n: int) -> None:
    """Add candidates m to n - 1, whose weight files are hard links to those of candidates 0 to m - 1.

    Each has another combination of files, so that no two candidates are equal: candidate i has file f of candidate
    (i + f * (i // m)) % m. There are up to m * m combinations.
    """
    written = sorted(directory.glob("step-*"))[:m]
    for i in range(m, n):
        target = directory / f"step-{i:02d}"
        target.mkdir()
        for path in written[0].iterdir():
            if path.suffix != ".safetensors":
                shutil.copy(path, target)
        for f, name in enumerate(sorted(path.name for path in written[0].glob("*.safetensors"))):
            os.link(written[(i + f * (i // m)) % m] / name, target / name)


def write_candidates(config: LlamaConfig, directory: Path, n: int, seed: int) -> None:
    """Write n candidates as Hugging Face directories of several files, the same ones for the same seed."""
    specs = tensors(config)
    files = {"config.json": (json.dumps(config.to_dict(), indent=2) + "\n").encode()}
    limit = sum(spec.nbytes for spec in specs) // 3  # the files of a candidate: four
    with ExitStack() as stack:
        writers = [
            stack.enter_context(
                writing(directory / f"step-{i:02d}", specs, Group.world(), max_shard_size=limit, files=files)
            )
            for i in range(n)
        ]
        for number, spec in enumerate(specs):
            generator = torch.Generator().manual_seed(seed * 1_000_003 + number)
            for writer, values in zip(writers, candidates_of(spec.shape, n, seed, generator), strict=True):
                writer.write(whole_tensor(spec.name, spec.shape), values.view(-1))


def candidates_of(shape: tuple[int, ...], n: int, seed: int, generator: torch.Generator) -> Iterator[torch.Tensor]:
    """Yield one tensor of each candidate, float32; the memory is used again for the next."""
    numel = torch.Size(shape).numel()
    matrix = len(shape) == 2
    base = torch.randn(shape, generator=generator).mul_(BASE) if matrix else torch.ones(shape)
    noise = student_t(numel + n, generator)  # each candidate's window begins elsewhere: no two are alike
    values = torch.empty(shape)
    for i, (lowrank, amount) in enumerate(amounts(n, seed)):
        torch.add(base, noise[i : i + numel].view(shape), alpha=amount, out=values)
        if matrix:
            a, b = (torch.randn(size, RANK, generator=generator) for size in shape)
            values.addmm_(a, b.T, alpha=lowrank / RANK**0.5)
        yield values


def amounts(n: int, seed: int) -> list[tuple[float, float]]:
    """Return (lowrank_i, noise_i), the standard deviations of two parts of a delta: half of AMOUNT to all of it."""
    generator = torch.Generator().manual_seed(seed)
    drawn = AMOUNT * BASE * (0.5 + 0.5 * torch.rand(n, 2, generator=generator, dtype=torch.float64))
    return [(lowrank, noise) for lowrank, noise in drawn.tolist()]


def student_t(count: int, generator: torch.Generator) -> torch.Tensor:
    """Return Student-t(3) numbers of variance 1, by Bailey's polar method (Mathematics of Computation 62, 1994)."""
    radius = 1 - torch.rand(count, generator=generator)  # in (0, 1]
    radius.pow_(-2 / 3).sub_(1).clamp_(min=0).sqrt_()  # sqrt(3 (u^(-2/3) - 1)), over the standard deviation, sqrt(3)
    return radius.mul_(torch.rand(count, generator=generator).mul_(2 * torch.pi).cos_())
