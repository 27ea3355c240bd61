"""Measure what averages cost beside a training step, against torch's, Lightning's and TRL's, in one training.

    python examples/running_averages/overhead.py --steps 12

A language model trains with AdamW in Lightning's Trainer. After each step of the optimizer every kind of average is
updated and timed, in another order each time, so that all see the same weights and the same load of the machine. Times
are CPU seconds of one thread: other programs on the machine change them little. TRL's callback is measured where `trl`
is installed; it is called as transformers' Trainer calls it.
"""

import argparse
import platform
import random
import statistics
import time
import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import twa_scale

try:
    from trl import BEMACallback
except ImportError:
    BEMACallback = None

DECAY, EVERY, KEEP, VOCABULARY, LENGTH = 0.999, 100, 40, 8192, 128


class LanguageModel(pl.LightningModule):
    def __init__(self, config: tuple[int, int]) -> None:
        super().__init__()
        self.config = config  # from which TRL makes another such model
        width, layers = config
        layer = nn.TransformerEncoderLayer(width, width // 64 or 1, 4 * width, 0.0, batch_first=True, norm_first=True)
        self.embed = nn.Embedding(VOCABULARY, width)
        self.blocks = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.head = nn.Linear(width, VOCABULARY, bias=False)

    def training_step(self, batch: Any, _: int) -> torch.Tensor:
        (tokens,) = batch
        mask = nn.Transformer.generate_square_subsequent_mask(LENGTH)
        logits = self.head(self.blocks(self.embed(tokens), mask=mask, is_causal=True))
        return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-4)


class Measure(pl.Callback):
    """Times every kind of average after each training step."""

    def __init__(self, skip: int) -> None:
        self.skip = skip
        self.theirs = EMAWeightAveraging(decay=DECAY)
        self.training: list[float] = []
        self.seconds: dict[str, list[float]] = {}
        self.nbytes: dict[str, int] = {}
        self.begun = 0.0

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self.theirs.setup(trainer, pl_module, stage)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.ema = twa_scale.RunningAverages(pl_module, ema=[DECAY])
        self.window = twa_scale.RunningAverages(pl_module, window={"every": 1, "keep": KEEP, "store": "packed1"})
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", twa_scale.TwaWarning)  # that the weights stay the same
            for _ in range(KEEP):  # a full window, whose oldest snapshot each new one drops
                self.window.step()
        self.bema = twa_scale.RunningAverages(pl_module, ema={"bema": True})
        self.torch = AveragedModel(pl_module, multi_avg_fn=get_ema_multi_avg_fn(DECAY), use_buffers=True)
        total_bytes = sum(tensor.nbytes for tensor in self.torch.state_dict().values())
        self.nbytes = {
            "ema": self.ema.nbytes,
            "window": self.window.nbytes,
            "torch": total_bytes,
            "lightning": total_bytes,
        }
        self.nbytes["bema"] = self.bema.nbytes
        if BEMACallback is not None:
            self.trl = BEMACallback(update_freq=1, device=str(pl_module.device))
            self.trl.on_train_begin(None, None, None, pl_module)
            trl_tensors = [*self.trl.running_model.parameters(), *self.trl.theta0_params, *self.trl.ema_params]
            self.nbytes["trl"] = sum(tensor.nbytes for tensor in trl_tensors)

    def on_train_batch_start(self, *args: Any) -> None:
        self.begun = time.process_time()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        self.training.append(time.process_time() - self.begun)
        updates: dict[str, Callable[[], object]] = {
            "ema": self.ema.step,
            "window": self.window.step,
            "bema": self.bema.step,
            "torch": lambda: self.torch.update_parameters(pl_module),
            "lightning": lambda: self.theirs.on_train_batch_end(trainer, pl_module, None, *args[1:]),
        }
        if BEMACallback is not None:
            state = SimpleNamespace(global_step=trainer.global_step)
            updates["trl"] = lambda: self.trl.on_step_end(None, state, None, pl_module)
        for name in random.sample(sorted(updates), len(updates)):
            started = time.process_time()
            updates[name]()
            self.seconds.setdefault(name, []).append(time.process_time() - started)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.report(sum(p.numel() for p in pl_module.parameters()))

    def report(self, elements: int) -> None:
        rows = [
            ("`RunningAverages(ema=[0.999])`", "ema", 1),
            (f"`RunningAverages(window={{'every': {EVERY}, 'keep': {KEEP}}})`", "window", EVERY),
            ("torch `AveragedModel`, EMA", "torch", 1),
            ("Lightning `EMAWeightAveraging`", "lightning", 1),
            ("`RunningAverages(ema={'bema': True})`", "bema", 1),
            ("TRL `BEMACallback(update_freq=1)`", "trl", 1),
        ]
        step = statistics.median(self.training[self.skip :])
        print(f"torch {torch.__version__}, {platform.machine()}, {elements / 1e6:.1f} M parameters, 1 thread, ", end="")
        print(f"{len(self.training) - self.skip} steps of {step:.2f} CPU s\n")
        print("| | bytes an element | of a training step | quartiles |\n| --- | ---: | ---: | ---: |")
        for title, name, every in [row for row in rows if row[1] in self.seconds]:
            ratios = [s / every / t for s, t in zip(self.seconds[name], self.training, strict=True)][self.skip :]
            low, middle, high = (f"{100 * q:.2f} %" for q in statistics.quantiles(ratios, n=4))
            print(f"| {title} | {self.nbytes[name] / elements:.1f} | {middle} | {low} to {high} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--skip", type=int, default=2, help="steps that are left out, in which memory is allocated")
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--batch", type=int, default=4)
    args = parser.parse_args()
    torch.set_num_threads(1)
    pl.seed_everything(0)
    tokens = torch.utils.data.TensorDataset(torch.randint(VOCABULARY, (args.batch * args.steps, LENGTH)))
    measure = Measure(args.skip)
    trainer = pl.Trainer(
        max_epochs=1,
        accelerator="cpu",
        devices=1,
        callbacks=[measure],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(LanguageModel((args.width, args.layers)), torch.utils.data.DataLoader(tokens, args.batch))


if __name__ == "__main__":
    main()
