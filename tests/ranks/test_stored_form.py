"""Experts in separate tensors of files, and tensors with other names: each rank reads and writes its part once."""

from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import twa_scale
from tests import flattened
from tests.grid import rest_slow
from tests.pool import Pool


def moe(seed: int) -> transformers.MixtralForCausalLM:
    torch.manual_seed(seed)
    config = transformers.MixtralConfig(
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=20,
        num_local_experts=4,
    )
    return transformers.MixtralForCausalLM(config)


def vit(seed: int) -> transformers.ViTForImageClassification:
    torch.manual_seed(seed)
    sizes = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2}
    return transformers.ViTForImageClassification(transformers.ViTConfig(**sizes, image_size=8, patch_size=4))


MODELS = {"moe": moe, "vit": vit}


def average(name: str, engine: str, paths: list[Path], out: Path) -> int:
    """Export the first candidate and save a snapshot of it. Return the bytes that were read."""
    model: torch.nn.Module = MODELS[name](9)
    if engine == "fsdp2":
        fully_shard(model.base_model)  # type: ignore[arg-type]
        fully_shard(model)
    elif engine == "ddp":
        model = DistributedDataParallel(model)
    elif engine in flattened.ENGINES:
        model = flattened.wrap_module(model, engine)
    average = twa_scale.attach(model, paths, {"center": 0})
    read = average.bytes_read
    average.export(out / "export")
    average.close()
    with twa_scale.Snapshots(out, every_n_steps=1, asynchronous=engine == "fsdp2") as snapshots:
        snapshots.step(model, 1)
    return read


@pytest.mark.parametrize(
    ("name", "engine", "size"),
    rest_slow(
        [
            ("moe", "fsdp2", 1),
            ("moe", "fsdp2", 2),
            ("moe", "fsdp2", 3),
            ("moe", "fsdp1", 2),
            ("moe", "ddp", 3),
            ("vit", "fsdp2", 2),
        ],
        lambda name, engine, size: engine == "fsdp1" or (engine == "fsdp2" and size == 3 - (name == "vit")),
    ),
)
def test_each_byte_is_read_once_and_written_where_it_was(
    ranks: Pool, tmp_path: Path, name: str, engine: str, size: int
) -> None:
    paths = [tmp_path / f"step-{i}" for i in range(2)]
    for i, path in enumerate(paths):
        MODELS[name](i).save_pretrained(path)
    first = load_file(paths[0] / "model.safetensors")
    assert first.keys() != MODELS[name](0).state_dict().keys()
    total = 2 * sum(value.nbytes for value in first.values())
    assert sum(ranks(average, size, name=name, engine=engine, paths=paths, out=tmp_path / "out")) == total
    for written in ("export", "step-00000001"):
        actual = load_file(tmp_path / "out" / written / "model.safetensors")
        assert actual.keys() == first.keys()
        assert not [key for key, value in first.items() if not torch.equal(actual[key], value)], written
