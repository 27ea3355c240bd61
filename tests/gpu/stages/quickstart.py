"""The run of the quickstart on this device, with candidates of a short training."""

from collections.abc import Iterator

import torch
from safetensors.torch import save_file

from tests.gpu.stages.setup import Row, Setup
from twa_scale.config import RunConfig, load_config
from twa_scale.run import run as train
from twa_scale.run.batches import make_batches
from twa_scale.run.tasks import build_task

CONFIG = "configs/quickstart.yaml"
N, EVERY = 8, 10


def run(setup: Setup) -> Iterator[Row]:
    overrides = [
        f"candidates={setup.scratch}/candidates/step-*",
        f"output={setup.scratch}/run",
        f"device={setup.device.type}",
        f"steps={setup.size(20, 2)}",
        f"evaluate_batches={setup.size(20, 1)}",
    ]
    config = load_config(CONFIG, overrides)
    first, last = pretrain(setup, config, setup.size(300, 4))
    yield Row(
        "training the candidates, loss", f"{first:.3f} to {last:.3f}", "lower", None if setup.tiny else last < first
    )
    summary = train(config)
    actual = {"average": summary["evaluation"], **summary["comparison"]}
    losses = {name: value for name, metrics in actual.items() for key, value in metrics.items() if key.endswith("loss")}
    measured = ", ".join(f"{name} {loss:.4f}" for name, loss in losses.items())
    better = losses["average"] <= losses["center"]
    yield Row("validation loss", measured, "average no worse than center", None if setup.tiny else better)


def pretrain(setup: Setup, config: RunConfig, steps: int) -> tuple[float, float]:
    """Train the model of the quickstart, write the last candidates, and return the first and the last loss."""
    torch.manual_seed(0)
    task = build_task(config.task)
    model = task.model().to(setup.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    batches = make_batches(task.dataset("train"), "train", config.batch_size, None, 0, 1, 1)
    losses = []
    for step in range(steps):
        (batch,) = batches.training(step)
        loss = task.loss(model, {key: value.to(setup.device) for key, value in batch.items()})
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        left = steps - 1 - step
        if left % setup.size(EVERY, 1) == 0 and left // setup.size(EVERY, 1) < N:
            folder = setup.scratch / "candidates" / f"step-{step:04d}"
            folder.mkdir(parents=True)
            save_file(
                {name: value.cpu().contiguous() for name, value in model.state_dict().items()},
                folder / "model.safetensors",
            )
    return losses[0], losses[-1]
