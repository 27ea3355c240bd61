"""The task of config.yaml: a text classifier that is a pretrained model with a LoRA adapter of PEFT."""

import copy
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from torch import nn

from examples.soup.finetune import classifier
from twa_scale.run.tasks.sequence_classification import SequenceClassification, SequenceClassificationOptions


class AdapterClassification(SequenceClassification):
    """The data and the loss of `sequence_classification`, and a PeftModel.

    Args:
        lora: settings of a new adapter.
        adapter: the directory of an adapter, which the model has; by default it has a new one.
        options: of `sequence_classification`.
    """

    def __init__(self, lora: dict[str, Any], adapter: str | None = None, **options: Any) -> None:
        super().__init__(SequenceClassificationOptions(**options))
        self._pretrained, self._lora, self._adapter = Path(options["model"]), lora, adapter

    def model(self) -> nn.Module:
        """Return the pretrained model with its adapter."""
        return self.model_with(self._adapter)

    def model_with(self, adapter: str | Path | None) -> nn.Module:
        """Return the pretrained model with an adapter, or with a new one, which is the same at every call."""
        base = copy.deepcopy(self._base)  # PEFT changes it in place
        if adapter is not None:
            held: nn.Module = PeftModel.from_pretrained(base, str(adapter), is_trainable=True)
            return held
        torch.manual_seed(0)
        new: nn.Module = get_peft_model(base, LoraConfig(task_type=TaskType.SEQ_CLS, **self._lora))
        return new

    @cached_property
    def _base(self) -> Any:
        return classifier(self._pretrained)
