"""What the Trainer of transformers saves: whole weights or shards, and small files next to them."""

from copy import deepcopy
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from transformers import PreTrainedModel
from transformers.dynamic_module_utils import custom_object_save

from twa_scale.engines.module_names import own_class


def saves_shards(trainer: Any) -> bool:
    """Return whether a Trainer saves its model only in shards, which no `from_pretrained` reads.

    With FSDP it does so for all but full state dicts.
    """
    return _saves_fsdp_shards(trainer) or _saves_zero_shards(trainer)


def small_files_of(trainer: Any) -> dict[str, bytes]:
    """Return the configurations and the code of the model, and the files of its tokenizer or processor, by path.

    Those of the model are left out if the Trainer trains an adapter.
    """
    model = trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False)
    parts = [trainer.processing_class or getattr(trainer.data_collator, "tokenizer", None)]
    config = None
    if isinstance(model, PreTrainedModel) and not _is_adapter(trainer):
        kind = own_class(model)
        config = deepcopy(model.config)
        config.architectures = [kind.__name__]
        parts += [config, model.generation_config if model.can_generate() else None]
    with TemporaryDirectory() as name:
        if config is not None and model.is_remote_code():
            custom_object_save(kind.__new__(kind), name, config)  # reads the class only
        for part in parts:
            if part is not None:
                part.save_pretrained(name)
        root = Path(name)
        return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


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
