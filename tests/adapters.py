"""Create small PEFT adapters of a tiny GPT-2 and write them with PEFT."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from tests import sums

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model

transformers.logging.set_verbosity_error()
IDS = torch.arange(12).view(1, 12) % 7
MODULES = ["c_attn", "wte"]


def base() -> Any:
    """Return the base model. It is the same at every call."""
    torch.manual_seed(0)
    sizes = {"n_layer": 2, "n_embd": 32, "n_head": 2, "vocab_size": 40, "n_positions": 16}
    special = {"bos_token_id": 0, "eos_token_id": 0}
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(**sizes, **special, attn_pdrop=0, embd_pdrop=0, resid_pdrop=0)
    )


def adapted(config: PeftConfig | None = None, seed: int = 0, **lora: Any) -> Any:
    """Return a PeftModel with random trainable tensors: LoRA with these settings, or the adapter of `config`."""
    settings = {"r": 4, "lora_alpha": 8, "target_modules": MODULES, "fan_in_fan_out": True}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(base(), config or LoraConfig(**(settings | lora)))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


def experts(seed: int, **lora: Any) -> Any:
    """Return a mixture of four experts in one tensor, with LoRA on that tensor unless `lora` is different."""
    settings = {"target_parameters": ["mlp.experts.gate_up_proj"], **lora}
    model = get_peft_model(mixture(), LoraConfig(**settings))
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    return model


def mixture() -> Any:
    """Return the base model of `experts`."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 12, "num_hidden_layers": 1, "vocab_size": 40}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 4}
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(**sizes, **heads))


def save(model: Any, path: Path) -> str:
    """Write the adapter with PEFT and return its directory."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(str(path), save_embedding_layers=False)
    return str(path)


def load(path: str | Path, trainable: bool = False, base: Callable[[], Any] = base) -> Any:
    """Return the base model with the adapter of a directory, loaded by PEFT. No tensor may be missing or unexpected."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = PeftModel.from_pretrained(base(), str(path), is_trainable=trainable)
    return model.train(trainable)


def updates(model: nn.Module, adapter: str = "default") -> dict[str, Tensor]:
    """Return s B A of every module in float64, as PEFT adds it to the base weight."""
    return {
        name: module.double().get_delta_weight(adapter).detach()
        for name, module in model.named_modules()
        if hasattr(module, "lora_A") and hasattr(module, "get_delta_weight")
    }


def weighted(parts: Sequence[Mapping[str, Tensor]], a: Sequence[float]) -> dict[str, Tensor]:
    """Return the weighted sum of updates."""
    return {name: sums.weighted(a, (part[name] for part in parts)) for name in parts[0]}


def logits(model: nn.Module) -> Tensor:
    """Return the logits of the model without dropout."""
    training = model.training
    model.eval()
    with torch.no_grad():
        actual: Tensor = model(IDS).logits
    model.train(training)
    return actual
