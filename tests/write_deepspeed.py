"""Write real DeepSpeed checkpoints of 1, 2 and 3 ranks: `python -m tests.write_deepspeed DIRECTORY`. Tests start it.

Where Lightning is installed, its Trainer writes some as well.
Beside each lies what DeepSpeed's own zero_to_fp32 makes of it, completed by what only the module holds.
"""

import gc
import importlib
import importlib.util
import os
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

os.environ["DS_ACCELERATOR"] = "cpu"

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.checkpoint import ds_to_universal
from deepspeed.utils import zero_to_fp32
from torch import nn
from torch.nn import functional as F

from tests.forked_ranks import run_on_ranks
from twa_scale.output.snapshots import Snapshots

if WITH_LIGHTNING := importlib.util.find_spec("lightning") is not None:
    import lightning
    from lightning.pytorch.callbacks import ModelCheckpoint
    from lightning.pytorch.plugins.environments import TorchElasticEnvironment
    from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy
# The first engine of a process imports these, which takes longer than its work. Ranks are forks.
for module in (
    "deepspeed.module_inject.auto_ep_layer",
    "torch._dynamo.backends.debugging",
    "torch._inductor.compile_fx",
    "torch._inductor.distributed_autotune",  # missing in torch 2.6
):
    if importlib.util.find_spec(module):
        importlib.import_module(module)
CASES: dict[str, dict[str, object]] = {
    "0-fp32": {"zero_optimization": {"stage": 0}},
    "0-bf16": {"zero_optimization": {"stage": 0}, "bf16": {"enabled": True}},
    "1-fp32": {"zero_optimization": {"stage": 1}},
    "1-bf16": {"zero_optimization": {"stage": 1}, "bf16": {"enabled": True}},
    # makes DeepSpeed choose its BF16_Optimizer, whose checkpoint does not name a stage
    "1-bf16-own": {
        "zero_optimization": {"stage": 1},
        "bf16": {"enabled": True},
        "data_types": {"grad_accum_dtype": "fp32"},
    },
    "2-fp32": {"zero_optimization": {"stage": 2, "round_robin_gradients": True}},
    "2-bf16": {"zero_optimization": {"stage": 2}, "bf16": {"enabled": True}},
    "3-fp32": {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0, "sub_group_size": 20}},
    "3-bf16": {"zero_optimization": {"stage": 3, "sub_group_size": 1000}, "bf16": {"enabled": True}},
}

UNIVERSAL = ("1-bf16", "2-bf16", "3-fp32", "3-bf16")
"""Cases of two ranks that DeepSpeed's own converter makes universal as well."""
SNAPSHOTS = ("1-bf16", "2-fp32", "3-fp32", "3-bf16")
SIZES = {1: ["0-fp32", "1-bf16", "2-fp32", "3-fp32"], 2: list(CASES), 3: ["1-fp32", "1-bf16-own", "2-bf16", "3-fp32"]}


class Odd(nn.Module):
    """A model with odd sizes, a tied head, frozen and empty parameters, and buffers of several types."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 5)
        self.up = nn.Linear(5, 11)
        self.gain = nn.Parameter(torch.randn(11), requires_grad=False)
        self.still = nn.Linear(11, 3, bias=False).requires_grad_(False)
        self.scale = nn.Parameter(torch.full((1,), 1.5))
        self.down = nn.Linear(11, 5, bias=False)
        self.head = nn.Linear(5, 7, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("mean", torch.randn(3, 5))
        self.register_buffer("count", torch.tensor(42))
        self.register_buffer("mask", torch.ones(4), persistent=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = F.gelu(self.up(self.embed(tokens))) * self.gain
        logits: torch.Tensor = self.head(self.down(x) * self.scale) + self.still(x).sum()
        return logits


def save(case: str, config: dict[str, object], directory: Path) -> None:
    torch.manual_seed(sum(map(ord, case)))
    model = Odd()
    expected = {name: value.clone() for name, value in model.state_dict().items()}
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    groups = [
        {"params": [p for p in trained.values() if p.dim() > 1]},
        {"params": [p for p in trained.values() if p.dim() <= 1]},
    ]
    common = {"train_micro_batch_size_per_gpu": 2, "zero_allow_untested_optimizer": True}
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=torch.optim.AdamW(groups, lr=0.1), config={**common, **config}
    )
    tokens = (torch.arange(6).view(2, 3) + dist.get_rank()) % 7
    engine.backward(engine(tokens).float().square().mean())
    engine.step()
    engine.save_checkpoint(str(directory / case), client_state={"args": Namespace(lr=0.1, text="of the user")})
    if dist.get_world_size() == 2 and case in SNAPSHOTS:
        with Snapshots(directory / f"{case}-snapshots", every_n_steps=1, asynchronous=True) as snapshots:
            snapshots.step(engine, 1)
            engine.backward(engine(tokens).float().square().mean())
            engine.step()
    if dist.get_rank():
        return
    if case.startswith("0"):
        expected = engine.module.state_dict()
    elif "own" in case:
        expected |= without_a_stage(directory / case / "global_step1")
    else:
        expected |= zero_to_fp32.get_fp32_state_dict_from_zero_checkpoint(str(directory / case))
    torch.save(expected, directory / f"{case}.pt")
    if dist.get_world_size() == 2 and case in UNIVERSAL:
        folders = {"input_folder": f"{directory / case}/global_step1", "output_folder": f"{directory}/u-{case}/step1"}
        options = {"num_extract_workers": 1, "num_merge_workers": 1, "keep_temp_folder": False, "strict": True}
        ds_to_universal.main(Namespace(**folders, **options, inject_missing_state=True))
        torch.save(expected, directory / f"u-{case}.pt")


def without_a_stage(folder: Path) -> dict[str, torch.Tensor]:
    """Return the part of zero_to_fp32 that follows its check of the stage."""
    states = zero_to_fp32.parse_model_states(zero_to_fp32.get_model_state_files(folder))
    files = [torch.load(file, weights_only=False) for file in zero_to_fp32.get_optim_files(folder)]
    groups = [file["optimizer_state_dict"]["single_partition_of_fp32_groups"] for file in files]
    whole: dict[str, torch.Tensor] = zero_to_fp32._get_fp32_state_dict_from_zero2_checkpoint(
        len(groups), groups, states, False
    )
    return whole


def save_all(size: int, directory: Path) -> None:
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # used for inference only, and compiles for minutes
    deepspeed.init_distributed("gloo")
    for case in SIZES[size]:
        save(case, CASES[case], directory)
        dist.barrier()


def save_with_lightning(stage: int, directory: Path) -> None:
    """Train two epochs of two steps. Lightning's strategy requires GPUs, but what it writes does not depend on them."""

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1))

        def training_step(self, batch: list[torch.Tensor], _: int) -> torch.Tensor:
            output: torch.Tensor = self.net(batch[0])
            return output.square().mean()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters(), lr=0.1)

    class OnCPU(DeepSpeedStrategy):
        def setup_environment(self) -> None:
            super(DDPStrategy, self).setup_environment()

        def setup_distributed(self) -> None:
            self.set_world_ranks()
            self._init_deepspeed_distributed()

        def _get_process_group_backend(self) -> str:
            return "gloo"

        @property
        def root_device(self) -> torch.device:
            return torch.device("cpu", 0)

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    torch.manual_seed(dist.get_rank())
    config: dict[str, Any] = {"zero_optimization": {"stage": stage}, "train_micro_batch_size_per_gpu": 2}
    trainer = lightning.Trainer(
        max_epochs=2,
        accelerator="cpu",
        devices=2,
        strategy=OnCPU(
            config={**config, "zero_allow_untested_optimizer": True}, cluster_environment=TorchElasticEnvironment()
        ),
        callbacks=[ModelCheckpoint(directory, save_top_k=-1, every_n_epochs=1)],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Module(), torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.randn(8, 3)), batch_size=2))
    if not dist.get_rank():
        for path in directory.glob("*.ckpt"):
            torch.save(zero_to_fp32.get_fp32_state_dict_from_zero_checkpoint(str(path)), f"{path}.expected")


def main() -> None:
    gc.freeze()  # DeepSpeed's BF16_Optimizer calls the garbage collector nine times
    for size in SIZES:
        directory = Path(sys.argv[1]) / str(size)
        directory.mkdir(parents=True)
        run_on_ranks(save_all, size, size, directory)
    for stage in (2, 3) if WITH_LIGHTNING else ():
        run_on_ranks(save_with_lightning, 2, stage, Path(sys.argv[1]) / f"lightning-{stage}")


if __name__ == "__main__":
    main()
