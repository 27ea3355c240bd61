"""Run all trainings with transformers' Trainer: `-m tests.integrations.train_transformers DIRECTORY`."""

import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType
from peft import LoraConfig, get_peft_model
from torch.distributed.tensor import DTensor
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments, set_seed

import twa_scale
from tests.forked_ranks import run_on_ranks
from twa_scale.integrations.transformers import CoefficientsCallback, TwaCallback

ON_RANKS = ("ddp", "fsdp2", "zero3")
STEPS, HALF, DECAY = 6, 3, 0.5
LEARN: dict[str, Any] = {"groups": "block", "optimizer": {"lr": 0.05}}
ROWS = {**LEARN, "groups": "tensor+row"}


class Texts(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """Random texts, the same on all ranks."""

    def __len__(self) -> int:
        return 48

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        tokens = torch.randint(50, (12,), generator=torch.Generator().manual_seed(i))
        return {"input_ids": tokens, "labels": tokens}


def settings_of(kind: str, *, whole: bool) -> dict[str, Any]:
    """Return the arguments of the Trainer. `whole` is whether it saves whole weights."""
    if kind == "fsdp2":
        state_dicts = "FULL_STATE_DICT" if whole else "SHARDED_STATE_DICT"
        policy = {"auto_wrap_policy": "TRANSFORMER_BASED_WRAP", "transformer_layer_cls_to_wrap": ["GPT2Block"]}
        return {"fsdp": True, "fsdp_config": {"version": 2, "state_dict_type": state_dicts, **policy}}
    if not kind.startswith("zero"):
        return {}
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # used for inference only, and compiles for minutes
    zero = {"stage": int(kind[4:]), "stage3_gather_16bit_weights_on_model_save": whole}
    auto = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    return {
        "deepspeed": {"zero_optimization": zero, "zero_allow_untested_optimizer": True, **dict.fromkeys(auto, "auto")}
    }


def build(seed: int) -> GPT2LMHeadModel:
    set_seed(seed)
    shape = {"vocab_size": 50, "n_positions": 16, "n_embd": 16, "n_layer": 2, "n_head": 2}
    dropout = {"resid_pdrop": 0.0, "attn_pdrop": 0.0, "embd_pdrop": 0.0}
    return GPT2LMHeadModel(GPT2Config(**shape, **dropout, bos_token_id=0, eos_token_id=0))


def learned(
    directory: Path, ranks: int = 1, resume: str | None = None, *, rows: bool = False, given: bool = False
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Train coefficients of given candidates, each step on all texts, with the average as the Trainer's optimizer.

    Args:
        directory: of the checkpoints.
        ranks: their number.
        resume: the checkpoint to resume from.
        rows: whether rows have coefficients of their own.
        given: whether the Trainer gets the callback, which is made in any case.

    Returns:
        The coefficients, and the weights.
    """
    model = build(9)
    twa = twa_scale.attach(model, [build(seed).state_dict() for seed in range(3)], ROWS if rows else LEARN)
    args = TrainingArguments(
        str(directory),
        max_steps=STEPS,
        per_device_train_batch_size=len(Texts()) // ranks // 2,
        gradient_accumulation_steps=2,
        learning_rate=LEARN["optimizer"]["lr"],
        save_steps=HALF,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = Trainer(model=model, args=args, train_dataset=Texts(), optimizers=(twa.as_optimizer(), None))
    callback = CoefficientsCallback(twa)
    if given:
        trainer.add_callback(callback)
    trainer.train(resume_from_checkpoint=resume)
    twa.close()
    return twa.coefficients, {name: p.detach().clone() for name, p in model.named_parameters()}


def refused(error: type[Exception], message: str, kind: str, directory: Path, **options: Any) -> None:
    """Check that a training is refused on this rank."""
    text = ""
    try:
        train(kind, directory, **options)
    except error as refusal:
        text = str(refusal)
    assert message in text, text


def train(
    kind: str,
    directory: Path,
    resume: str | None = None,
    *,
    whole: bool = True,
    adapter: bool = False,
    **options: Any,
) -> Trainer:
    """Train a small GPT-2, or an adapter of it, for six steps of two batches, with a checkpoint at each step."""
    model: Any = build(0)
    if adapter:
        model = get_peft_model(model, LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True))
    set_seed(0)
    args = TrainingArguments(
        str(directory),
        max_steps=STEPS,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        eval_strategy="steps",
        eval_steps=HALF,
        save_steps=1,
        logging_steps=2,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        **settings_of(kind, whole=whole),
    )
    window = {"every": 1, "keep": 3, "store": "packed8"}
    callback = Counting(ema=[DECAY], window=window, **options)
    trainer = Trainer(model=model, args=args, train_dataset=Texts(), eval_dataset=Texts(), callbacks=[callback])
    trainer.train(resume_from_checkpoint=resume)
    return trainer


class Counting(TwaCallback):
    """Keeps the number of steps of the optimizer of the coefficients."""

    learned_steps = 0

    def _steps(self, twa: twa_scale.TrainableAverage, batches: Any) -> None:
        super()._steps(twa, batches)
        (state,) = twa.optimizer.state.values()
        self.learned_steps = int(state["step"])


class FsdpAccelerator(Accelerator):
    """An accelerator that uses FSDP on a CPU."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        for state in (PartialState(), self.state):
            state.distributed_type = DistributedType.FSDP
        self.state.fsdp_plugin = options["fsdp_plugin"]


def write(kind: str, directory: Path) -> None:
    """Train, resume the second half from the checkpoint, and write all results to a directory."""
    if kind == "fsdp2":
        transformers.trainer.Accelerator = FsdpAccelerator
    trainer = train(kind, directory, learn=LEARN, learn_steps=3)
    metrics = {key: value for entry in trainer.state.log_history for key, value in entry.items() if key != "step"}
    if kind == "fsdp2":
        assert all(isinstance(p, DTensor) for p in trainer.model_wrapped.parameters())
    metrics["own_loss"] = trainer.evaluate()["eval_loss"]
    (callback,) = (item for item in trainer.callback_handler.callbacks if isinstance(item, Counting))
    metrics["learned_steps"] = callback.learned_steps
    if trainer.args.process_index == 0:
        torch.save(metrics, directory / "metrics.pt")
    torch.distributed.is_initialized() and torch.distributed.barrier()
    if trainer.args.process_index == 0:
        average = Path("average", "model.safetensors")
        (directory / f"checkpoint-{STEPS}" / average).rename(directory / "uninterrupted.safetensors")
        (directory / average).rename(directory / "learned.safetensors")
    torch.distributed.is_initialized() and torch.distributed.barrier()
    train(kind, directory, str(directory / f"checkpoint-{HALF}"))
    if kind in ("fsdp2", "zero3"):
        shards = directory / "shards"
        train(kind, shards, whole=False, learn=LEARN, learn_steps=3)
        train(kind, shards, str(shards / f"checkpoint-{HALF}"), whole=False, learn=LEARN, learn_steps=3)
        refused(twa_scale.OutputError, "average: was not written by ranks together", kind, directory, whole=False)
    if kind == "fsdp2":
        train(kind, directory / "adapters", whole=False, adapter=True, learn=LEARN, learn_steps=3)
        train(kind, directory / "whole-adapters", adapter=True, learn=LEARN, learn_steps=3)
    if kind == "ddp":
        path = directory / "learned"
        half = str(path / f"checkpoint-{HALF}")
        actual = learned(path, 2, rows=True, given=True), learned(path, 2, half, rows=True, given=True)
        message = ""
        try:
            learned(directory / "refused", 2, rows=True)
        except twa_scale.TwaError as error:
            message = str(error)
        torch.save((*actual, message), directory / f"coefficients-{trainer.args.process_index}.pt")


if __name__ == "__main__":
    for kind in ON_RANKS:
        run_on_ranks(write, 2, kind, Path(sys.argv[1]) / kind)
    write("plain", Path(sys.argv[1]) / "plain")
