"""Plans of models that look at values, as Hugging Face's do before they choose a mask."""

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from twa_scale.config import RunConfig, validated
from twa_scale.plan import make_plan
from twa_scale.tasks import build_task, stack

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


@pytest.mark.parametrize("tied", [True, False])
def test_activations_of_a_hugging_face_model_are_counted_without_memory(tmp_path: Path, tied: bool) -> None:
    settings = LlamaConfig(vocab_size=256, tie_word_embeddings=tied, **SIZES)
    for step in range(2):
        torch.manual_seed(step)
        LlamaForCausalLM(settings).save_pretrained(tmp_path / f"step-{step}")
    data = {
        "candidates": f"{tmp_path}/step-*",
        "task": {
            "name": "causal_lm", "model": str(tmp_path / "step-0"), "tokens": __file__, "token_dtype": "uint8",
            "context": 16, "fractions": {"train": 1, "validation": 0, "test": 0},
        },
        "output": str(tmp_path / "out"), "steps": 1, "batch_size": 4,
    }  # fmt: skip
    config = validated(RunConfig, data)
    plan = make_plan(config, 2)
    assert plan.notes == ()

    task = build_task(config.task)
    model = task.model()
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        task.loss(model, stack([task.dataset("train")[0]] * 2))
    sizes = [tensor.untyped_storage().nbytes() for place, tensor in kept.items() if place not in weights]
    real = sum(sizes) + 2 * max(sizes)
    assert real <= plan.step["activations"] <= 1.5 * real  # attention without a fused kernel keeps its matrix
