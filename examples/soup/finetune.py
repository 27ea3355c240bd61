"""Fine-tune the pretrained model once: one ingredient of the soup."""

import argparse
from pathlib import Path

import torch
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
    print(f"{arguments.out}: rate {arguments.lr}, last batch {loss:.3f}")


def finetune(task: Task, pretrained: Path, seed: int, lr: float, steps: int, batch_size: int, out: Path) -> float:
    """Train a classifier on batches of `train` in an order that the seed chooses, and save a Hugging Face directory.

    Returns:
        The loss of the last batch.
    """
    torch.manual_seed(0)  # one new head for all: weights can be averaged when they begin at one place
    model = AutoModelForSequenceClassification.from_pretrained(pretrained, num_labels=2, trust_remote_code=False)
    torch.manual_seed(seed)
    examples = task.dataset("train")
    order = torch.cat([torch.randperm(len(examples)) for _ in range(steps)]).tolist()
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps)
    model.train()
    for step in range(steps):
        batch = stack([examples[i] for i in order[step * batch_size : (step + 1) * batch_size]])
        optimizer.zero_grad()
        loss = task.loss(model, batch)
        loss.backward()
        optimizer.step()
        scheduler.step()
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(pretrained, trust_remote_code=False).save_pretrained(out)
    return loss.item()


if __name__ == "__main__":
    main()
