"""Save, average and load checkpoints by NeMo 2's own checkpoint IO, on one rank without a GPU.

NeMo asks for GPUs in its trainers, not in `MegatronCheckpointIO`, which writes the folder `weights` of a checkpoint.
It is no requirement of development: it needs an older Lightning, and packages that only its other parts use.

    pip install --no-deps nemo_toolkit==2.5.3 lightning==2.4.0 pytorch-lightning==2.4.0  # and what its import misses
    python -m tests.integrations.train_nemo DIRECTORY
"""

import sys
from pathlib import Path

import torch
from nemo.lightning.io import pl
from torch import Tensor

import twa_scale
from tests.forked_ranks import run_on_ranks
from tests.integrations.train_megatron import RENAME, Training
from twa_scale.merge import average_fixed

STEPS = (9, 19)


def save_and_load(directory: Path) -> None:
    """Save checkpoints as NeMo's strategy does, attach, average them in the same format, and load the result."""
    pl._fix_tensors_device = lambda checkpoint: checkpoint  # it moves tensors to a GPU
    io = pl.MegatronCheckpointIO(save_ckpt_format="torch_dist")
    states: list[dict[str, Tensor]] = []
    for step in STEPS:
        model = Training(step).model
        # A strategy leaves the state dict of the module to the sharded one; "module." is its prefix in NeMo.
        counters = {"epoch": 0, "global_step": step + 1, "consumed_samples": 20 * step}
        path = directory / f"model--val_loss=0.50-step={step}-consumed_samples={20.0 * step}"
        io.save_checkpoint({**counters, "sharded_state_dict": model.sharded_state_dict(prefix="module.")}, str(path))
        states.append({name: p.detach().clone() for name, p in model.named_parameters()})
    mean = {name: ((value.float() + states[1][name].float()) / 2).bfloat16() for name, value in states[0].items()}

    model = Training(1).model
    twa = twa_scale.attach(model, f"{directory}/model--*", {"rename": RENAME})
    assert all(torch.equal(p, mean[name]) for name, p in model.named_parameters())
    twa.close()
    average_fixed([f"{directory}/model--*"], directory / "same", format="same")
    sharded = Training(2).model.sharded_state_dict(prefix="module.")
    loaded = io.load_checkpoint(str(directory / "same"), sharded_state_dict=sharded)
    assert (loaded["global_step"], loaded["consumed_samples"]) == (STEPS[-1] + 1, 20 * STEPS[-1])
    assert all(torch.equal(loaded[f"module.{name}"], value) for name, value in mean.items())


if __name__ == "__main__":
    run_on_ranks(save_and_load, 1, Path(sys.argv[1]))
