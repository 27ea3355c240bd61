"""Read checkpoints that torchtitan and timm write with their own code, without training.

Neither is a requirement of development.

    pip install --no-deps --target DIRECTORY torchtitan==0.3.0 timm==1.0.31  # and the packages that they import
    PYTHONPATH=DIRECTORY pytest tests/integrations/test_frameworks.py
"""

import argparse
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import twa_scale
from twa_scale.merge import average_fixed


def model(seed: int) -> nn.Module:
    """Return weights with few bits, so that their mean is exact."""
    torch.manual_seed(seed)
    made = nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3), nn.Linear(3, 2))
    return made.bfloat16().float()


def check(pattern: str, **spec: Any) -> None:
    """Check that candidates with the weights of `model(0)` and `model(1)` are averaged, without copies of them."""
    live = model(2)
    twa_scale.attach(live, pattern, spec).close()
    for mean, first, second in zip(live.parameters(), model(0).parameters(), model(1).parameters(), strict=True):
        assert torch.equal(mean, (first + second) / 2)


@pytest.mark.slow
def test_timm(tmp_path: Path) -> None:
    saver = pytest.importorskip("timm.utils", reason="timm or torchvision is not installed", exc_type=ImportError)
    for epoch in (0, 1):
        stored = model(epoch)
        args = argparse.Namespace(model="x", lr=[1e-3])
        ema = saver.ModelEmaV3(model(1 - epoch))
        optimizer = torch.optim.AdamW(stored.parameters())
        saver.CheckpointSaver(stored, optimizer, args, ema, checkpoint_dir=str(tmp_path)).save_checkpoint(epoch, 1.0)
    check(f"{tmp_path}/*.pth.tar")  # in the same directory as last.pth.tar and model_best.pth.tar
    check(f"{tmp_path}/*.pth.tar", weights_key="state_dict_ema")


class _Adapter:
    fqn_to_index_mapping = None

    def to_hf(self, state: dict[str, Any]) -> dict[str, Any]:
        return state


@pytest.mark.slow
@pytest.mark.parametrize("to_hf", [False, True])
def test_torchtitan(tmp_path: Path, to_hf: bool) -> None:
    dcp = pytest.importorskip(
        "torchtitan.components.checkpoint", reason="torchtitan is not installed", exc_type=ImportError
    )
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    for step in (0, 1):
        config = dcp.CheckpointManager.Config(enable=True, last_save_in_hf=to_hf, keep_latest_k=0)
        parts = {"dataloader": None, "optimizers": None, "lr_schedulers": None}
        manager = dcp.CheckpointManager(
            config, model_parts=[model(step)], states={}, sd_adapter=_Adapter(), base_folder=str(tmp_path), **parts
        )
        manager.save(step, last_step=True)
    dist.destroy_process_group()
    check(f"{tmp_path}/checkpoint/step-*")
    average_fixed([f"{tmp_path}/checkpoint/step-*"], tmp_path / "same", format="same")
    assert not (tmp_path / "same/sharded").exists()  # the files of each rank, before the average
