"""Train with Accelerate."""

import os
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DeepSpeedPlugin, DistributedType, FullyShardedDataParallelPlugin

import twa_scale
from tests.integrations.small import (
    ACCUMULATE,
    DECAY,
    LEARN,
    ROWS,
    SIZE,
    STEPS,
    WINDOW,
    coefficients_by_hand,
    loss_of,
    network,
    require_equal,
    require_learned,
    rows,
    same,
    weights_of,
)
from twa_scale.integrations import accelerate as averaging
from twa_scale.running.state_file import plain

KINDS = ("ddp", "fsdp2", "zero2", "zero3")


def accelerator_of(kind: str) -> Accelerator:
    AcceleratorState._reset_state(True)
    os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)
    os.environ.pop("ACCELERATE_USE_FSDP", None)
    if kind == "fsdp2":
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            reshard_after_forward=True,
            auto_wrap_policy="size_based_wrap",
            min_num_params=1,
            state_dict_type="SHARDED_STATE_DICT",
        )
        accelerator = Accelerator(cpu=True, fsdp_plugin=plugin, gradient_accumulation_steps=ACCUMULATE)
        for state in (PartialState(), accelerator.state):  # Accelerate does not choose FSDP on CPUs
            state.distributed_type = DistributedType.FSDP
        accelerator.state.fsdp_plugin = plugin
        return accelerator
    if not kind.startswith("zero"):
        return Accelerator(cpu=True, gradient_accumulation_steps=ACCUMULATE)
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # used for inference only, and compiles for minutes
    config = {
        "train_micro_batch_size_per_gpu": SIZE // 2,
        "gradient_accumulation_steps": ACCUMULATE,
        "zero_optimization": {"stage": int(kind[4:])},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    accelerator = Accelerator(deepspeed_plugin=DeepSpeedPlugin(config), gradient_accumulation_steps=ACCUMULATE)
    # On CPUs Accelerate considers each rank the only one.
    for state in (PartialState(), accelerator.state):
        state.num_processes, state.process_index = dist.get_world_size(), dist.get_rank()
        state.local_process_index = dist.get_rank()
    return accelerator


class Training:
    """A model, its optimizer and its data, prepared by an accelerator."""

    def __init__(self, kind: str, given: bool = False) -> None:
        self.accelerator = accelerator_of(kind)
        net = network()
        optimizer = torch.optim.SGD(net.parameters(), 0.0) if given else torch.optim.AdamW(net.parameters(), lr=0.05)
        data: Any = list(rows())  # torch's annotations require a data set, but every sequence is one
        loader: torch.utils.data.DataLoader[Any] = torch.utils.data.DataLoader(
            data, SIZE // self.accelerator.num_processes
        )
        self.model, self.optimizer, self.loader = self.accelerator.prepare(net, optimizer, loader)

    def epoch(self, optimizer: Any = None) -> None:
        """Train for three steps of two batches."""
        for x in self.loader:
            self.micro_step(x, optimizer)

    def micro_step(self, x: torch.Tensor, optimizer: Any = None) -> None:
        """Train on one batch."""
        optimizer = optimizer or self.optimizer
        with self.accelerator.accumulate(self.model):
            self.accelerator.backward(loss_of(self.model, x))
            optimizer.step()
            optimizer.zero_grad()

    def weights(self) -> dict[str, torch.Tensor]:
        """Return the weights without the names of wrappers."""
        net = self.accelerator.unwrap_model(self.model)
        if any(hasattr(p, "ds_id") for p in net.parameters()):
            import deepspeed

            with deepspeed.zero.GatheredParameters(list(net.parameters())):
                return weights_of(net)
        return weights_of(net)


def results(kind: str, directory: Path) -> dict[str, Any]:
    """Return the results of a training, and of its second half resumed from the saved state."""
    actual: dict[str, Any] = {}
    first = Training(kind)
    averages = averaging.prepare(first.accelerator, first.model, ema=[DECAY], window=WINDOW)
    first.epoch()
    first.accelerator.save_state(str(directory / "half"))
    half = deepcopy(plain(averages.state_dict()))
    first.epoch()
    actual["steps"] = averages.num_steps
    actual["trained"] = first.weights()
    with averages.weights("ema"):
        actual["ema"] = first.weights()
    with averages.learning(LEARN) as twa:
        first.epoch(averaging.optimizer_of(first.accelerator, twa, save=False))
        actual["learned"] = first.weights()
    actual["trained again"] = first.weights()
    second = Training(kind)
    resumed = averaging.prepare(second.accelerator, second.model, ema=[DECAY], window=WINDOW)
    second.accelerator.load_state(str(directory / "half"))
    actual["same"] = same(half, plain(resumed.state_dict()))
    second.epoch()
    with resumed.weights("ema"):
        actual["resumed"] = second.weights()
    return {**actual, **coefficients(kind, directory)}


def coefficients(kind: str, directory: Path) -> dict[str, Any]:
    """Return the coefficients of given candidates after two epochs, and after a resumed second epoch."""
    candidates = [network(seed).state_dict() for seed in range(3)]
    first = Training(kind, given=True)
    twa = twa_scale.attach(first.model, candidates, ROWS)
    optimizer = averaging.optimizer_of(first.accelerator, twa)
    actual: dict[str, Any] = {"rows": []}
    half = directory / "coefficients"
    if first.accelerator.is_main_process:
        half.mkdir(parents=True)
        torch.save([], half / "custom_checkpoint_0.pkl")  # of another object; Accelerate replaces it
    first.accelerator.wait_for_everyone()
    for _ in range(3):  # into the same directory
        first.accelerator.save_state(str(half))
        first.accelerator.wait_for_everyone()
        actual["rows"].append(len(list(half.glob("custom_checkpoint_0_rows/state.rows-*/rows.safetensors"))))
    first.epoch(optimizer)
    first.accelerator.save_state(str(half))
    first.accelerator.wait_for_everyone()
    actual["in the state"] = torch.load(half / "custom_checkpoint_0.pkl", weights_only=True)["rows"]["values"]
    first.epoch(optimizer)
    actual |= {"coefficients": twa.coefficients, "averaged": first.weights()}
    twa.close()
    second = Training(kind, given=True)
    twa = twa_scale.attach(second.model, candidates, ROWS)
    optimizer = averaging.optimizer_of(second.accelerator, twa)
    second.accelerator.load_state(str(half))
    second.epoch(optimizer)
    twa.close()
    return {**actual, "coefficients again": twa.coefficients, "averaged again": second.weights()}


def require_results(found: dict[str, Any], by_hand: dict[str, Any], tolerance: float) -> None:
    """Check averages, resumed averages, and coefficients learned from the window or of given candidates."""
    assert found["steps"] == STEPS and found["same"]
    require_equal(found["trained"], by_hand["trained"], tolerance)
    require_equal(found["ema"], by_hand["ema"], tolerance)
    require_equal(found["resumed"], by_hand["ema"], tolerance)
    require_learned(found["learned"], by_hand)
    require_equal(found["trained again"], found["trained"])
    coefficients, averaged = coefficients_by_hand()
    torch.testing.assert_close(found["coefficients"], coefficients, rtol=0, atol=1e-6)
    require_equal(found["averaged"], averaged, 1e-6)
    assert torch.equal(found["coefficients again"], found["coefficients"])
    require_equal(found["averaged again"], found["averaged"])
    assert found["in the state"] == {} and found["rows"] == [1, 2, 2]  # of the previous state and of this one
