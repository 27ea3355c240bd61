"""Experts that files store apart and the model stacks: each rank reads and writes its own part of them, once."""

from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import twa_scale
from tests import flattened
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


def average(engine: str, paths: list[Path], out: Path) -> int:
    """Export the first candidate and save a snapshot of it; return the bytes that were read."""
    model: torch.nn.Module = moe(9)
    if engine == "fsdp2":
        for layer in model.model.layers:  # type: ignore[union-attr,operator]
            fully_shard(layer)
        fully_shard(model)
    elif engine == "ddp":
        model = DistributedDataParallel(model)
    elif engine in flattened.ENGINES:
        model = flattened.hold(model, engine)
    average = twa_scale.attach(model, paths, {"center": 0})
    read = average.bytes_read
    average.export(out / "export")
    average.close()
    with twa_scale.Snapshots(out, every_n_steps=1, asynchronous=engine == "fsdp2") as snapshots:
        snapshots.step(model, 1)
    return read


@pytest.mark.parametrize(("engine", "size"), [("fsdp2", 1), ("fsdp2", 2), ("fsdp2", 3), ("fsdp1", 2), ("ddp", 3)])
def test_each_byte_of_an_expert_is_read_once_and_written_where_it_was(
    ranks: Pool, tmp_path: Path, engine: str, size: int
) -> None:
    paths = [tmp_path / f"step-{i}" for i in range(2)]
    for i, path in enumerate(paths):
        moe(i).save_pretrained(path)
    first = load_file(paths[0] / "model.safetensors")
    assert any(".experts.3.w1." in name for name in first)
    total = 2 * sum(value.nbytes for value in first.values())
    assert sum(ranks(average, size, engine=engine, paths=paths, out=tmp_path / "out")) == total
    for written in ("export", "step-00000001"):
        found = load_file(tmp_path / "out" / written / "model.safetensors")
        assert found.keys() == first.keys()
        assert not [name for name, value in first.items() if not torch.equal(found[name], value)], written
