"""The files and names that the blocks of the documentation use: a model, batches, and candidates at runs/a."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import twa_scale


class Model(nn.Module):
    """A model of blocks that returns its loss, as models of transformers do."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))

    def forward(self, x: Tensor) -> SimpleNamespace:
        for block in self.blocks:
            x = torch.tanh(block(x))
        return SimpleNamespace(loss=x.square().mean())


def write_candidates(folder: Path) -> None:
    """Write three candidates of `Model` to folder/step-*."""
    snapshots = twa_scale.Snapshots(folder, every_n_steps=1)
    for step in (1, 2, 3):
        torch.manual_seed(step)
        snapshots.save(Model(), step)


def write_adapters() -> None:
    """Write three LoRA adapters of `Model` to lora/step-*."""
    from peft import LoraConfig, get_peft_model

    for step in (1, 2, 3):
        adapted = get_peft_model(Model(), LoraConfig(r=2, target_modules=["blocks.0", "blocks.1"]))
        torch.manual_seed(step)
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                nn.init.normal_(parameter, std=0.1)
        adapted.save_pretrained(f"lora/step-{step}")


def names() -> dict[str, Any]:
    """Return the names that a block may use without defining them."""
    random = torch.Generator().manual_seed(0)
    return {
        "torch": torch,
        "dist": dist,
        "twa_scale": twa_scale,
        "loader": [{"x": torch.randn(4, 8, generator=random)} for _ in range(3)],
        "steps": 3,
        "evaluate": lambda model: None,
    }
