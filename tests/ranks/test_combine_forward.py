"""`combine: forward` writes each unit of FSDP2 when it is gathered, with the same results as `combine: step`."""

from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

import twa_scale
from tests import flattened, meshes, models
from tests.gathering import whole_tensors
from tests.grid import rest_slow
from tests.pool import Pool
from tests.ranks import cases, test_script_features
from twa_scale import Snapshots

UNITS = {"root": "embed.weight", "first": "blocks.0.qkv.weight", "second": "blocks.1.qkv.weight"}


def build(mode: str) -> Any:
    """Return the test model, sharded so that FSDP2 gathers in a given way."""
    model: Any = models.build(seed=99)
    if mode in ("hsdp", "fsdp2-tp"):
        return models.wrap(model, mode)
    if mode == "bf16":
        return models.wrap(model, "fsdp2", MixedPrecisionPolicy(torch.bfloat16, torch.float32))
    if mode in ("kept", "resharded"):
        scalars = {p for p in model.parameters() if p.dim() == 0}
        for part in model.blocks:
            fully_shard(part, reshard_after_forward=mode == "resharded")
        return fully_shard(model, reshard_after_forward=mode == "resharded", ignored_params=scalars)
    before, after = test_script_features.CHANGES.get(mode, (test_script_features.same, test_script_features.same))
    model = after(models.wrap(before(model), "fsdp2"))
    if mode == "prefetched":
        model.set_modules_to_forward_prefetch([model.blocks[0], model.blocks[1]])
        model.blocks[1].set_modules_to_backward_prefetch([model.blocks[0]])
    return model


def attach(model: nn.Module, combine: str) -> twa_scale.TrainableAverage:
    return twa_scale.attach(model, models.candidates(), {"groups": "block", "combine": combine})


def own_loss(model: nn.Module, step: int) -> Tensor:
    return models.loss(model, models.part(models.batch(step), *meshes.data_place(model, *cases.where())))


def train(mode: str, combine: str, out: Path) -> dict[str, Any]:
    """Train, and read the weights in all ways between steps and forward passes."""
    torch._dynamo.reset()
    model = build(mode)
    twa = attach(model, combine)
    seen: dict[str, Any] = {"losses": []}

    def step(number: int, passes: int = 1) -> None:
        for _ in range(passes):
            loss = own_loss(model, number)
            seen["losses"].append(loss.item())
            loss.backward()
        twa.step()
        twa.zero_grad()

    step(0, passes=2)
    step(10, passes=2)
    with torch.inference_mode():
        seen["evaluated"] = own_loss(model, 20).item()
    step(11)
    with twa.weights("last"):
        seen["last"] = own_loss(model, 20).item()
    seen["left"] = own_loss(model, 20).item()
    step(12)
    twa.recalibrate_batchnorm([models.part(models.batch(30), *cases.where())], models.loss)
    seen |= {f"buffer {name}": buffer.clone() for name, buffer in model.named_buffers()}
    step(13)
    twa.export(out / "export")
    step(14)
    Snapshots(out / "snapshots", every_n_steps=1).save(model, 1)
    step(15)
    kept = {name: value.clone() for name, value in model.state_dict().items()}
    seen |= whole_tensors(kept)
    saved = twa.state_dict()
    step(16)
    twa.load_state_dict(saved)
    seen["loaded"] = own_loss(model, 20).item()
    step(17)
    model.load_state_dict(kept)
    seen["given"] = own_loss(model, 20).item()
    step(18)
    twa.write_deferred()
    seen["deferred written"] = cases.gathered(model)
    step(19)
    twa.close()
    seen["closed"] = cases.gathered(model)
    return seen


def assert_same(found: Any, want: Any, where: str = "") -> None:
    """Return whether two results have the same bits."""
    if isinstance(want, Tensor):
        assert torch.equal(found, want), where
    elif isinstance(want, dict):
        assert found.keys() == want.keys()
        for key in want:
            assert_same(found[key], want[key], f"{where} {key}")
    else:
        assert found == want, where


MODES = [
    ("nothing", 1),
    ("nothing", 3),
    ("prefetched", 2),
    ("bf16", 2),
    ("kept", 2),
    ("resharded", 2),
    ("hsdp", 2),
    ("fsdp2-tp", 2),
    ("checkpoint", 2),
    ("unused", 2),
    ("compiled-after", 2),
]
LONG = ["fsdp2-tp", "compiled-after", "checkpoint", "unused", "resharded", "bf16", "kept"]


@pytest.mark.parametrize(("mode", "size"), rest_slow(MODES, lambda mode, size: mode not in LONG and size < 3))
def test_results_equal_those_of_combine_step(ranks: Pool, tmp_path: Path, mode: str, size: int) -> None:
    actual, expected = (ranks(train, size, mode=mode, combine=c, out=tmp_path / c) for c in ("forward", "step"))
    for rank in range(size):
        assert_same(actual[rank], expected[rank], f"rank {rank}")
    for file in ("export/model.safetensors", "snapshots/step-00000001/model.safetensors"):
        assert_same(load_file(tmp_path / "forward" / file), load_file(tmp_path / "step" / file), file)


class Interrupted(Exception):
    """An exception that a forward pass raises."""


def watch(mode: str) -> dict[str, Any]:
    """Return which units hold the weights of a step, at several points until the end of the next forward pass."""
    model = build(mode)
    twa = attach(model, "forward")
    stored = {unit: dict(model.named_parameters())[name].to_local().detach() for unit, name in UNITS.items()}
    scalar = model.embed_mix.scale.detach()
    own_loss(model, 0).backward()
    old, before = {unit: value.clone() for unit, value in stored.items()}, scalar.clone()
    positions: dict[str, Any] = {}

    def look(place: str) -> None:
        positions[place] = {unit for unit, value in stored.items() if not torch.equal(value, old[unit])}

    def interrupt(*_: object) -> None:
        look("in the stem")
        raise Interrupted

    twa.cost(1)
    twa.step()
    twa.zero_grad()
    look("after the step")
    positions["ignored"] = not torch.equal(scalar, before)
    at_step = twa.cost(1)["combine"]
    hook = model.stem.register_forward_pre_hook(interrupt)
    with suppress(Interrupted):
        own_loss(model, 1)
    hook.remove()
    model.reset_iter_state()
    for i, block in enumerate(model.blocks):
        block.register_forward_pre_hook(lambda *_, i=i: look(f"in block {i}"))
    loss = own_loss(model, 1)
    later = twa.cost(1)["combine"]
    positions["clock"] = at_step["seconds_in_forward"] == 0 < later["seconds"] < later["seconds_in_forward"]
    loss.backward()  # gathers again
    positions["again"] = twa.cost(1)["combine"]["seconds"]
    return positions


@pytest.mark.parametrize(("mode", "in_block_0"), [("nothing", {"root", "first"}), ("prefetched", set(UNITS))])
def test_units_are_written_before_they_are_gathered(ranks: Pool, mode: str, in_block_0: set[str]) -> None:
    """This also holds after an interrupted forward pass. Parameters that FSDP2 ignores are written at the step."""
    for positions in ranks(watch, 2, mode=mode):
        assert positions == {
            "after the step": set(),
            "ignored": True,
            "in the stem": in_block_0 if mode == "prefetched" else {"root"},
            "in block 0": in_block_0,
            "in block 1": set(UNITS),
            "clock": True,
            "again": 0,
        }


def refuse(mode: str) -> None:
    model: Any = build(mode) if mode == "nothing" else models.wrap(models.build(), mode)
    if mode == "nothing":
        group = model._get_fsdp_state()._fsdp_param_group
        group.unshard = group.unshard
    attach(model, "forward")


@pytest.mark.parametrize("mode", ["plain", "ddp", *flattened.ENGINES, "tp", "nothing"])
def test_models_without_a_hook_for_units_are_refused(ranks: Pool, mode: str) -> None:
    """These are engines without a hook for units, and FSDP2 models whose `unshard` was replaced by other code."""
    message = str(ranks.error(refuse, 2, mode=mode))
    assert "combine: 'forward'" in message and "set `combine: step`" in message
    assert ("replaced its unshard" in message) == (mode == "nothing")


def close() -> tuple[list[str], str, list[str], bool]:
    """Return the hooks of an average, the error of a second one, the hooks after close, and whether training works."""
    model = build("nothing")
    before = marks(model)
    twa = attach(model, "forward")
    put = marks(model) - before
    second = cases.error_text(lambda: attach(model, "forward"))
    twa.close()
    left = marks(model) - before
    repeated = attach(model, "forward")
    own_loss(model, 0).backward()
    return sorted(put), second, sorted(left), repeated.step()


def marks(model: nn.Module) -> set[str]:
    actual = set()
    for name, child in model.named_modules():
        stored = {"save": child._state_dict_pre_hooks, "load": child._load_state_dict_pre_hooks}
        if isinstance(child, FSDPModule):
            stored["unshard"] = "unshard" in vars(child._get_fsdp_state()._fsdp_param_group)
        actual |= {f"{label} {name}" for label, there in stored.items() if there}
    return actual


def test_close_removes_all_hooks(ranks: Pool) -> None:
    for put, second, left, moved in ranks(close, 2):
        assert {"unshard ", "unshard blocks.0", "unshard blocks.1", "save embed", "load blocks.1.qkv"} <= set(put)
        assert "another average is attached" in second
        assert left == [] and moved
