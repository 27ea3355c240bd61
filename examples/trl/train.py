"""Averages in TRL's trainers: fine-tune a small Llama with SFTTrainer, then with DPOTrainer, and resume the second.

    pip install trl
    python examples/trl/train.py --output runs/trl

The model learns to write the docstring of a function from its first line, on the sources of Python's standard library.
DPO prefers the function's own docstring to another one's. `train` also takes coefficients of given candidates as the
optimizer of the trainer. tests/integrations/test_trl.py checks the numbers.
"""

import argparse
import ast
import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is read from the hub

from datasets import Dataset
from tokenizers import ByteLevelBPETokenizer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

import twa_scale
from twa_scale.integrations.transformers import TwaCallback

TRAINERS = {"sft": (SFTTrainer, SFTConfig), "dpo": (DPOTrainer, DPOConfig)}


def functions(modules: int) -> Iterator[tuple[str, str]]:
    """Yield first lines and docstrings of the functions of so many modules of the standard library."""
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[:modules]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and (text := ast.get_docstring(node)):
                yield f"def {node.name}({ast.unparse(node.args)}):\n", text.partition("\n")[0]


def data_of(kind: str, modules: int) -> tuple[Dataset, Dataset]:
    """Return the data to train on, and every eighth example, which is held out."""
    result = list(functions(modules))
    rows: list[dict[str, str]] = []
    for i, (prompt, text) in enumerate(result):
        other = result[(i + 7) % len(result)][1]
        answer = {"completion": text} if kind == "sft" else {"chosen": text, "rejected": other}
        rows.append({"prompt": prompt, **answer})
    held_out = rows[::8]
    return Dataset.from_list([row for i, row in enumerate(rows) if i % 8]), Dataset.from_list(held_out)


def write_start(directory: Path, modules: int) -> Path:
    """Write a small untrained Llama and a tokenizer that is trained on the texts."""
    if (directory / "config.json").exists():
        return directory
    tokenizer = ByteLevelBPETokenizer()
    texts = (prompt + text for prompt, text in functions(modules))
    tokenizer.train_from_iterator(texts, vocab_size=512, special_tokens=["<pad>", "<end>"], show_progress=False)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer._tokenizer, pad_token="<pad>", eos_token="<end>")
    fast.save_pretrained(directory)
    config = LlamaConfig(
        vocab_size=len(fast),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=128,
        pad_token_id=fast.pad_token_id,
        bos_token_id=fast.eos_token_id,
        eos_token_id=fast.eos_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    return directory


def train(
    kind: str,
    start: Path,
    output: Path,
    *callbacks: TrainerCallback,
    modules: int = 40,
    candidates: Any = None,
    resume: str | None = None,
    **settings: Any,
) -> Any:
    """Train a model from `start` with a trainer of TRL, and return the trainer.

    Args:
        kind: "sft" or "dpo".
        start: directory of the model and the tokenizer.
        output: the trainer's output directory.
        callbacks: TwaCallback is one of these.
        modules: how many modules of the standard library the data are of.
        candidates: train only the coefficients of these, as `attach` takes them.
        resume: a checkpoint to resume from.
        settings: further settings of the trainer.
    """
    trainer_class, config_class = TRAINERS[kind]
    model = LlamaForCausalLM.from_pretrained(start)
    train_data, held_out = data_of(kind, modules)
    options: dict[str, Any] = {"max_grad_norm": 0.0} if candidates else {}
    args = config_class(
        str(output),
        **{"max_length": 96, "report_to": [], "use_cpu": True, "disable_tqdm": True, **options, **settings},
    )
    twa = twa_scale.attach(model, candidates, {"groups": "block", "optimizer": {"lr": 0.05}}) if candidates else None
    trainer = trainer_class(
        model=model,
        args=args,
        train_dataset=train_data,
        eval_dataset=held_out,
        processing_class=PreTrainedTokenizerFast.from_pretrained(start),
        callbacks=list(callbacks),
        **({"optimizers": (twa.as_optimizer(), None)} if twa else {}),
    )
    trainer.train(resume_from_checkpoint=resume)
    if twa:
        twa.export(output / "average", overwrite=True)
        twa.close()
    return trainer


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("runs/trl"))
    parser.add_argument("--steps", type=int, default=200)
    options = parser.parse_args()
    start = write_start(options.output / "start", modules=40)
    tenth = max(1, options.steps // 10)
    for kind in TRAINERS:
        callback = TwaCallback(
            ema=[0.98],
            window={"every": max(1, tenth // 2), "keep": 10},
            evaluate_also=["last", "mean"],
            learn={"groups": "block"},
            learn_steps=tenth,
        )
        output = options.output / kind
        settings = {
            "max_steps": options.steps,
            "eval_strategy": "steps",
            "eval_steps": 2 * tenth,
            "logging_steps": tenth,
        }
        trainer = train(kind, start, output, callback, learning_rate=2e-3, save_steps=2 * tenth, **settings)
        for entry in trainer.state.log_history:
            losses = {key: f"{value:.4f}" for key, value in entry.items() if key.endswith("_loss")}
            print(kind, entry["step"], *(f"{key}={value}" for key, value in losses.items()), flush=True)
        start = output / "average"  # DPO continues from the average of the fine-tuning, and prefers against it


if __name__ == "__main__":
    main()
