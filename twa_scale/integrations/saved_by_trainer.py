"""What the Trainer of transformers saves: whole weights or shards, and small files next to them."""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from twa_scale.output.model_files import files_in


def saves_shards(trainer: Any) -> bool:
    """Return whether a Trainer saves its model only in shards, which no `from_pretrained` reads.

    With FSDP it does so for all but full state dicts.
    """
    return _saves_fsdp_shards(trainer) or _saves_zero_shards(trainer)


def small_files_of(trainer: Any) -> dict[str, bytes]:
    """Return the files of the tokenizer or processor of a Trainer, by path."""
    processing = trainer.processing_class or getattr(trainer.data_collator, "tokenizer", None)
    if processing is None:
        return {}
    with TemporaryDirectory() as name:
        processing.save_pretrained(name)
        return files_in(Path(name))


def _is_adapter(trainer: Any) -> bool:
    return hasattr(trainer.model, "peft_config")


def _saves_fsdp_shards(trainer: Any) -> bool:
    if not trainer.is_fsdp_enabled:
        return False
    return "FULL_STATE_DICT" not in str(trainer.accelerator.state.fsdp_plugin.state_dict_type)


def _saves_zero_shards(trainer: Any) -> bool:
    if not trainer.is_deepspeed_enabled or _is_adapter(trainer):  # The Trainer gathers adapters in any case.
        return False
    engine = trainer.model_wrapped
    return engine.zero_optimization_partition_weights() and not engine.zero_gather_16bit_weights_on_model_save()
