"""Fine-tune the pretrained model once: one ingredient of the soup."""

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from twa_scale.config import load_config
from twa_scale.run.tasks import Task, build_task, stack


def main() -> None:
    """Read the arguments, and fine-tune."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config", type=Path)
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--model", type=Path, required=True, help="pretrained directory")
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--lr", type=float, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    task = build_task(load_config(arguments.config, arguments.overrides).task)
    options = arguments.model, arguments.seed, arguments.lr, arguments.steps, arguments.batch_size, arguments.out
    loss = finetune(task, *options)
    print(f"{arguments.out}: learning rate {arguments.lr}, last batch {loss:.3f}")


def finetune(
    task: Task, pretrained: Path, seed: int, lr: float, steps: int, batch_size: int, out: Path, device: str = "cpu"
) -> float:
    """Train a classifier as `train` does, and save a Hugging Face directory. Return the loss of the last batch."""
    model = classifier(pretrained).to(device)
    loss = train(task, model, seed, lr, steps, batch_size)
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(pretrained, trust_remote_code=False).save_pretrained(out)
    return loss


def classifier(pretrained: Path) -> Any:
    """Return the pretrained model with a new head, which is the same at every call."""
    torch.manual_seed(0)  # An average of models with different heads is usually bad.
    return AutoModelForSequenceClassification.from_pretrained(pretrained, num_labels=2, trust_remote_code=False)


def train(task: Task, model: nn.Module, seed: int, lr: float, steps: int, batch_size: int) -> float:
    """Train the parameters of a model that need a gradient, with a one-cycle schedule.

    The seed chooses the order of the examples of `train`, and dropout.

    Returns:
        The loss of the last batch.
    """
    torch.manual_seed(seed)
    examples: Any = task.dataset("train")
    device = next(model.parameters()).device
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=0.01, fused=True)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps)
    model.train()
    for indices in random_batches(torch.as_tensor(examples.token_counts), batch_size, steps):
        batch = {key: value.to(device) for key, value in stack([examples[i] for i in indices.tolist()]).items()}
        optimizer.zero_grad()
        loss = task.loss(model, batch)
        loss.backward()
        optimizer.step()
        scheduler.step()
    return loss.item()


def random_batches(token_counts: Tensor, batch_size: int, steps: int) -> list[Tensor]:
    """Return random batches of examples of similar length, so that little of a batch is padding.

    Each epoch shuffles the examples, and sorts each group of eight batches by length. Batches of less than `batch_size`
    examples are left out.
    """
    result: list[Tensor] = []
    while len(result) < steps:
        for chunk in torch.randperm(len(token_counts)).split(8 * batch_size):
            batches = chunk[token_counts[chunk].argsort()].split(batch_size)
            result += [batches[i] for i in torch.randperm(len(batches)).tolist() if len(batches[i]) == batch_size]
    return result[:steps]


if __name__ == "__main__":
    main()
