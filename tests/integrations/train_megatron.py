"""Save, average and resume checkpoints of Megatron-core, on ranks that `main` forks.

The model is a GPT of Megatron-core in bfloat16, split over the ranks by tensor parallelism. As in Megatron's own
optimizer, which needs a GPU, AdamW has float32 copies of the weights, and both are saved by Megatron's functions.
"""

import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

warnings.simplefilter("ignore")  # of optional GPU kernels that are not installed
from megatron.core import dist_checkpointing, parallel_state  # noqa: E402
from megatron.core.dist_checkpointing import ShardedObject, ShardedTensor  # noqa: E402
from megatron.core.dist_checkpointing.optimizer import (  # noqa: E402
    get_param_id_to_sharded_param_map,
    make_sharded_optimizer_tensor,
    optim_state_to_sharding_state,
)
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec  # noqa: E402
from megatron.core.models.gpt.gpt_model import GPTModel  # noqa: E402
from megatron.core.transformer.transformer_config import TransformerConfig  # noqa: E402

import twa_scale  # noqa: E402
from tests.forked_ranks import run_on_ranks  # noqa: E402
from twa_scale.merge import average_fixed  # noqa: E402

STEPS = (100, 1000)
RENAME = {
    r"self_attention\.linear_qkv\.layer_norm_": "input_layernorm.",
    r"mlp\.linear_fc1\.layer_norm_": "pre_mlp_layernorm.",
}
"""Names in files, and those of the live model without Transformer Engine."""

# The writer asks the GPU to finish, and for the device of a flag that ranks exchange.
torch.cuda.synchronize = lambda device=None: None
torch.cuda.current_device = lambda: "cpu"  # type: ignore[assignment,return-value]


class Training:
    """A model, and an optimizer with float32 copies of its weights."""

    def __init__(self, seed: int) -> None:
        size = dist.get_world_size()
        if not parallel_state.model_parallel_is_initialized():
            parallel_state.initialize_model_parallel(tensor_model_parallel_size=size)
        torch.manual_seed(seed)
        config = TransformerConfig(
            num_layers=2,
            hidden_size=16,
            num_attention_heads=4,
            use_cpu_initialization=True,
            params_dtype=torch.bfloat16,
            bf16=True,
            tensor_model_parallel_size=size,
            gradient_accumulation_fusion=False,
        )
        spec = get_gpt_layer_local_spec()
        self.model = GPTModel(config, spec, vocab_size=32, max_sequence_length=8).bfloat16()
        self.copies = [p.detach().float().requires_grad_() for p in self.model.parameters()]
        self.optimizer = torch.optim.AdamW(self.copies, lr=0.1)
        self.step()

    def step(self) -> None:
        """Take a step with a gradient that is the same on all ranks."""
        for copy in self.copies:
            copy.grad = torch.full_like(copy, torch.rand(()).item() - 0.5)
        self.optimizer.step()
        for p, copy in zip(self.model.parameters(), self.copies, strict=True):
            p.data.copy_(copy)

    def sharded(self, iteration: int) -> dict[str, Any]:
        """Return the state that Megatron-LM saves, as its Float16OptimizerWithFloat16Params does for the optimizer."""
        weights = self.model.sharded_state_dict()
        ids = get_param_id_to_sharded_param_map(weights, self.model.parameters())
        state = self.optimizer.state_dict()
        step = state["state"][0]["step"]
        optim_state_to_sharding_state(state, ids, exclude_keys="step")
        state["state"]["common_step"] = step
        copies = [
            make_sharded_optimizer_tensor(ids[i], c, "optimizer.state.fp32_param") for i, c in enumerate(self.copies)
        ]
        return {
            "iteration": iteration,
            "args": {"hidden_size": 16},
            "model": weights,
            "optimizer": {"optimizer": state, "fp32_from_fp16_params": [copies]},
            "rng_state": ShardedObject("rng_state", [{"seed": iteration}], (1,), (0,), dist.get_rank()),
        }


def save(directory: Path) -> None:
    """Save a checkpoint after each of some steps."""
    training = Training(0)
    run = directory / "run"
    for step in STEPS:
        training.step()
        path = run / f"iter_{step:07d}"
        path.mkdir(parents=True, exist_ok=True)
        dist.barrier()
        dist_checkpointing.save(training.sharded(step), str(path))
    (run / "latest_checkpointed_iteration.txt").write_text(str(STEPS[-1]))


def load(path: Path) -> dict[str, Any]:
    """Load a checkpoint into a new training with Megatron-core on this number of ranks."""
    training = Training(1)
    loaded: dict[str, Any] = dist_checkpointing.load(training.sharded(0), str(path))
    names = [name for name, _ in training.model.named_parameters()]
    copies = dict(zip(names, loaded["optimizer"]["fp32_from_fp16_params"][0], strict=True))
    assert not any(isinstance(tensor, ShardedTensor) for tensor in copies.values())
    return {**loaded, "copies": copies, "moments": loaded["optimizer"]["optimizer"]["state"]}


def require_same(found: dict[Any, Any], wanted: dict[Any, Any]) -> None:
    """Check that states of an optimizer, or extra states, have the same bits."""
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        if isinstance(value, dict):
            require_same(found[key], value)
        elif isinstance(value, torch.Tensor):
            assert torch.equal(found[key], value), key


def require_average(found: dict[str, Any], steps: list[dict[str, Any]], dtype: torch.dtype) -> None:
    """Check that the weights and the optimizer's copies are the average, and the rest is from the last step."""
    last = steps[-1]
    assert found["iteration"] == last["iteration"] == STEPS[-1]
    assert found["rng_state"] == last["rng_state"]
    require_same(found["moments"], last["moments"])
    for name, copy in found["copies"].items():
        stored = [(step["model"] if dtype == torch.bfloat16 else step["copies"])[name].float() for step in steps]
        mean = (sum(stored) / len(stored)).to(dtype).float()
        torch.testing.assert_close(copy, mean, rtol=1e-2 if dtype == torch.bfloat16 else 1e-6, atol=1e-6)
        assert torch.equal(copy.bfloat16(), found["model"][name])
    assert any(not torch.equal(found["model"][name], last["model"][name]) for name in found["copies"])


def resume(directory: Path) -> None:
    """Average checkpoints that more ranks have saved, and load the averages."""
    run, out = directory / "run", directory / "average"
    steps = [load(run / f"iter_{step:07d}") for step in STEPS]
    # The pattern also matches the file that names the last iteration.
    average_fixed([str(run / "*")], out / "iter_0001000", format="same")
    before = {path.name for path in (run / "iter_0001000").iterdir()}
    assert {path.name for path in (out / "iter_0001000").iterdir()} == before | {"twa_scale.json", "README.md"}
    for name in ("common.pt", "metadata.json", ".metadata"):
        assert (out / "iter_0001000" / name).read_bytes() == (run / "iter_0001000" / name).read_bytes()
    require_average(load(out / "iter_0001000"), steps, torch.bfloat16)
    average_fixed([str(run / "*")], out / "exact", format="same", weights_key="optimizer.state.fp32_param")
    require_average(load(out / "exact"), steps, torch.float32)
    attach(run, out)


def attach(run: Path, out: Path) -> None:
    """Attach a live model to the checkpoints, whose layers are stacked, and export them in their own format."""
    model = Training(2).model
    average = twa_scale.attach(model, str(run / "iter_*"), {"center": "last", "rename": RENAME, "groups": "tensor"})
    last = load(run / "iter_0001000")["model"]
    for name, value in model.state_dict().items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, last[name]), name
    average.export(out / "exported", format="same")
    average.export(out / "hf")
    stored = load(out / "exported")["model"]
    assert all(torch.equal(stored[name], value) for name, value in last.items() if isinstance(value, torch.Tensor))


def main(directory: str) -> None:
    """Call this from `python -c`: Megatron starts processes to write, and each imports the main module."""
    run_on_ranks(save, 2, Path(directory))
    run_on_ranks(resume, 1, Path(directory))
