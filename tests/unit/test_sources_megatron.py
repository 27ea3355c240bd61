"""Checkpoints of Megatron-LM and NeMo in the format `torch_dist`, written with torch.

tests/integrations/test_megatron.py has some that Megatron-core and NeMo themselves have written.
"""

import io
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn

import twa_scale
from tests.old_torch import ALONE
from tests.slices import opened, read
from tests.specs import found, refused
from twa_scale import TwaWarning
from twa_scale.errors import CandidateError, OutputError
from twa_scale.merge import average_fixed
from twa_scale.output.formats.other_copies import other_tensors

LAYERS, WIDTH = 3, 4
ADDED = {"twa_scale.json", "README.md"}
Tensors = dict[str, torch.Tensor]


def weights(seed: int) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    return {
        "embedding.weight": torch.randn(5, WIDTH, generator=generator).bfloat16(),
        "decoder.layers.linear.weight": torch.randn(LAYERS, WIDTH, WIDTH, generator=generator).bfloat16(),
        "decoder.layers.linear.bias": torch.randn(LAYERS, WIDTH, generator=generator).bfloat16(),
    }


def optimizer_of(state: Tensors, copy: str = "fp32_param", chain: str = "") -> Tensors:
    """Return moments and float32 copies of weights, which are more precise."""
    kept = {f"{chain}optimizer.state.exp_avg.{name}": torch.ones_like(value.float()) for name, value in state.items()}
    return kept | {
        f"{chain}optimizer.state.{copy}.{name}": value.float() * (1 + 2**-12) for name, value in state.items()
    }


def save(folder: Path, state: Tensors, **more: Any) -> Path:
    folder.mkdir(parents=True)
    extra = {"decoder.layers.linear._extra_state/shard_0_3": io.BytesIO(b"scales"), "rng_state/shard_0_1": io.BytesIO()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a process without a group
        dcp.save({**state, **extra, **more}, storage_writer=dcp.FileSystemWriter(folder), **ALONE)
    torch.save({"iteration": 1, "args": None}, folder / "common.pt")
    (folder / "metadata.json").write_text(json.dumps({"sharded_backend": "torch_dist"}))
    return folder


def run(directory: Path, optimizer: Any = optimizer_of) -> None:
    for i, step in enumerate((90, 1000)):
        state = weights(i)
        save(directory / f"iter_{step:07d}", {**state, **optimizer(state)})
    (directory / "latest_checkpointed_iteration.txt").write_text("1000\n")


def mean(name: str) -> torch.Tensor:
    return ((weights(0)[name].float() + weights(1)[name].float()) / 2).bfloat16().reshape(-1)


def loaded(folder: Path, *names: str) -> list[torch.Tensor]:
    metadata = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
    into = {name: torch.empty(metadata[name].size, dtype=metadata[name].properties.dtype) for name in names}  # type: ignore[union-attr]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.load(into, storage_reader=dcp.FileSystemReader(folder), **ALONE)
    return [into[name] for name in names]


def test_a_pattern_of_everything_takes_the_iterations(working_directory: Path) -> None:
    run(working_directory / "run")
    assert found("run/*") == (["run/iter_0000090", "run/iter_0001000"], [])
    average_fixed(["run/*"], "out")
    assert {path.name for path in Path("out").iterdir()} == {"model.safetensors", *ADDED}
    assert opened(working_directory / "out").names() == sorted(weights(0))
    assert torch.equal(read(opened(working_directory / "out"), "embedding.weight", 0, 20), mean("embedding.weight"))
    average_fixed(["run/*"], "dcp", format="dcp")
    assert not Path("dcp/metadata.json").exists()


@pytest.mark.parametrize(
    ("copy", "chain"), [("fp32_param", ""), ("param", ""), ("master_param", "chained_0."), ("param", "chained_12.")]
)
def test_the_copies_of_the_optimizer_become_the_average_too(working_directory: Path, copy: str, chain: str) -> None:
    run(working_directory / "run", lambda state: optimizer_of(state, copy, chain))
    average_fixed(["run/*"], "out", format="same")
    last = working_directory / "run/iter_0001000"
    assert {path.name for path in Path("out").iterdir()} == {path.name for path in last.iterdir()} | ADDED
    for name in ("common.pt", "metadata.json", ".metadata"):
        assert Path("out", name).read_bytes() == (last / name).read_bytes()
    for name in weights(0):
        copies = f"{chain}optimizer.state.{copy}.{name}"
        model, exact, moments = loaded(
            working_directory / "out", name, copies, f"{chain}optimizer.state.exp_avg.{name}"
        )
        assert torch.equal(model.reshape(-1), mean(name)) and torch.equal(exact, model.float())
        assert torch.equal(moments, torch.ones_like(exact))
    average_fixed(["run/*"], "exact", format="same", weights_key=f"{chain}optimizer.state.{copy}")
    model, exact = loaded(working_directory / "exact", name, copies)
    first, last_one = (optimizer_of(weights(i))[f"optimizer.state.fp32_param.{name}"] for i in (0, 1))
    torch.testing.assert_close(exact, (first + last_one) / 2)
    assert not torch.equal(exact, exact.bfloat16().float()) and torch.equal(model, exact.bfloat16())


EXPERTS = "decoder.layers.linear.weight"  # a placeholder for them


def optimizers_of(state: Tensors) -> Tensors:
    """Return the state of an optimizer of experts and of one of all other weights."""
    dense = {name: value for name, value in state.items() if name != EXPERTS}
    of_experts = optimizer_of({EXPERTS: state[EXPERTS]}, "param", "chained_1.")
    return optimizer_of(dense, "param", "chained_0.") | of_experts


def test_the_copies_of_all_chained_optimizers_are_averaged(working_directory: Path) -> None:
    run(working_directory / "run", optimizers_of)
    average_fixed(["run/*"], "out", format="same", weights_key="optimizer.state.param")
    for name, chain in (("embedding.weight", 0), (EXPERTS, 1)):
        model, exact = loaded(working_directory / "out", name, f"chained_{chain}.optimizer.state.param.{name}")
        first, last = (optimizer_of(weights(i))[f"optimizer.state.fp32_param.{name}"] for i in (0, 1))
        torch.testing.assert_close(exact, (first + last) / 2)
        assert torch.equal(model, exact.bfloat16())
    with pytest.raises(OutputError, match=rf"chained_1\.optimizer\.state\.param\.{EXPERTS}'.* leave out `weights_key`"):
        average_fixed(["run/*"], "dense", format="same", weights_key="chained_0.optimizer.state.param")


def test_one_copy_in_two_chained_optimizers_is_refused(working_directory: Path) -> None:
    run(
        working_directory / "run",
        lambda state: optimizer_of(state, "param", "chained_0.") | optimizer_of(state, "param", "chained_1."),
    )
    with pytest.raises(CandidateError, match=r"takes both 'chained_0\..*' and 'chained_1\..*Name one optimizer"):
        average_fixed(["run/*"], "out", weights_key="optimizer.state.param")


def test_weights_without_a_copy_are_averaged_only_as_weights_of_the_model(working_directory: Path) -> None:
    def optimizer(state: Tensors) -> Tensors:
        return optimizer_of({name: value for name, value in state.items() if name != EXPERTS}, "param")

    run(working_directory / "run", optimizer)
    average_fixed(["run/*"], "out", format="same")
    assert torch.equal(loaded(working_directory / "out", EXPERTS)[0].reshape(-1), mean(EXPERTS))
    with pytest.raises(OutputError, match=rf"'{EXPERTS}' of the model, .* stay that of the last candidate"):
        average_fixed(["run/*"], "exact", format="same", weights_key="optimizer.state.param")


@pytest.mark.parametrize("copy", ["param", "fp32_param"])
def test_copies_of_another_shape_are_refused(working_directory: Path, copy: str) -> None:
    run(
        working_directory / "run",
        lambda state: {name: value.reshape(1, -1) for name, value in optimizer_of(state, copy).items()},
    )
    with pytest.raises(OutputError, match=rf"optimizer\.state\.{copy}\..*the optimizer's copy of weights"):
        average_fixed(["run/*"], "out", format="same")
    average_fixed(["run/*"], "hf")


def test_weights_are_not_searched_once_for_each_tensor(working_directory: Path) -> None:
    class Weights(list[tuple[str, ...]]):
        def __contains__(self, keys: object) -> bool:
            raise AssertionError("a search of all weights")

    state = weights(0)
    folder = save(working_directory / "iter_1", {**state, **optimizer_of(state)})
    moments = {(f"optimizer.state.exp_avg.{name}",) for name in state}
    assert other_tensors(folder, Weights((name,) for name in state)).keys() == moments


def test_optimizer_state_of_a_module_called_param_is_not_averaged(working_directory: Path) -> None:
    for step in (1, 2):
        state = {"param.weight": torch.randn(3), "optimizer.state.param.weight.exp_avg": torch.ones(3)}
        save(working_directory / f"iter_{step}", state)
    average_fixed(["iter_*"], "out", format="same")
    assert torch.equal(loaded(working_directory / "out", "optimizer.state.param.weight.exp_avg")[0], torch.ones(3))


@pytest.mark.parametrize(
    "entry",
    [
        "optimizer.distributed.dp_group_idx_0.gbuf_idx_0.dtype_(torch.bfloat16, torch.float32).bucket_idx_0.param",
        "chained_1.optimizer.distributed.dp_group_idx_0.param_state/shard_0_1",
    ],
    ids=["tensor", "object"],
)
def test_flat_copies_of_the_optimizer_are_refused(working_directory: Path, entry: str) -> None:
    flat = io.BytesIO(b"pickle") if "param_state" in entry else torch.zeros(7)
    for step in (1, 2):
        save(
            working_directory / f"iter_{step:07d}",
            {**weights(step), "optimizer.state.exp_avg.embedding.weight": torch.ones(5, WIDTH)},
            **{entry: flat},
        )
    with pytest.raises(OutputError, match=r"bucket_idx_0.param'|param_state/shard_0_1'.* --dist-ckpt-optim-fully-resh"):
        average_fixed(["iter_*"], "out", format="same")
    average_fixed(["iter_*"], "out")
    assert opened(working_directory / "out").names() == sorted(weights(0))


def test_a_directory_with_a_tracker_is_the_iteration_that_it_names(working_directory: Path) -> None:
    run(working_directory / "a")
    run(working_directory / "b")
    (working_directory / "a/latest_checkpointed_iteration.txt").write_text("90")
    average_fixed(["a", "b"], "out", format="same")
    assert {path.name for path in Path("out").iterdir()} == {
        "iter_0001000",
        "latest_checkpointed_iteration.txt",
        *ADDED,
    }
    assert torch.equal(
        loaded(working_directory / "out/iter_0001000", "embedding.weight")[0].reshape(-1), mean("embedding.weight")
    )
    with pytest.warns(TwaWarning, match="'a' and 'a/iter_0000090' are the same and count 2 times"):
        average_fixed(["a", "a/iter_0000090"], "twice")
    for messages in ("7", "newest", "9" * 40, "release"):
        (working_directory / "b/latest_checkpointed_iteration.txt").write_text(messages)
        assert f"names the iteration {messages!r}, but there is no folder" in refused(["b"])


def test_the_weights_of_nemo(working_directory: Path) -> None:
    for step in (9, 19):
        path = working_directory / f"ckpts/model--val_loss=0.50-step={step}-consumed_samples={20.0 * step}"
        save(path / "weights", {f"module.{name}": value for name, value in weights(step // 10).items()})
        (path / "context").mkdir()
        (path / "context/model.yaml").write_text("a: 1")
    average_fixed(["ckpts/*"], "out")
    assert torch.equal(read(opened(working_directory / "out"), "embedding.weight", 0, 20), mean("embedding.weight"))
    average_fixed(["ckpts/*"], "same", format="same")
    assert Path("same/context/model.yaml").exists() and Path("same/weights/common.pt").exists()


def test_other_formats_of_megatron_are_refused_by_name(working_directory: Path) -> None:
    (working_directory / "iter_0000001/mp_rank_00").mkdir(parents=True)
    torch.save({}, working_directory / "iter_0000001/mp_rank_00/model_optim_rng.pt")
    assert "in its format 'torch', with a file of each rank" in refused(["iter_0000001"])
    (save(working_directory / "iter_0000002", weights(0)) / ".metadata").unlink()
    assert "the save was not finished" in refused(["iter_0000002"])


@pytest.mark.parametrize("tensors_of", ["each rank", "an unfinished save"])
def test_tracker_of_another_format_raises_like_the_folder(working_directory: Path, tensors_of: str) -> None:
    run(working_directory / "run")
    folder = working_directory / "run/iter_0001000"
    (folder / ".metadata").unlink()
    if tensors_of == "each rank":
        (folder / "common.pt").unlink()
        (folder / "mp_rank_00").mkdir()
        torch.save({}, folder / "mp_rank_00/model_optim_rng.pt")
    message = refused(["run"])
    assert message == refused(["run/iter_0001000"])
    assert "--ckpt-convert-format torch_dist" in message


@pytest.mark.parametrize("form", ["hf", "dcp"])
def test_only_the_format_same_keeps_the_tracker(working_directory: Path, form: str) -> None:
    run(working_directory / "a")
    run(working_directory / "b")
    average_fixed(["a", "b"], "out", format=form)
    assert not list(Path("out").rglob("latest_checkpointed_iteration.txt"))


# Stacked layers


class Layers(nn.Module):
    def __init__(self, layers: int = LAYERS) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, WIDTH)
        self.decoder = nn.Module()
        self.decoder.layers = nn.ModuleList(nn.ModuleDict({"linear": nn.Linear(WIDTH, WIDTH)}) for _ in range(layers))


def test_a_model_with_a_tensor_for_each_layer_reads_and_writes_stacked_ones(working_directory: Path) -> None:
    run(working_directory / "run")
    model = Layers()
    with pytest.warns(TwaWarning, match="stored tensors that stack those of all layers are divided"):
        average = twa_scale.attach(model, "run/*", {"center": "last", "groups": "block"})
    last = weights(1)
    for i in range(LAYERS):
        layer = model.get_submodule(f"decoder.layers.{i}.linear")
        assert torch.equal(layer.get_parameter("weight"), last["decoder.layers.linear.weight"][i].float())
        assert torch.equal(layer.get_parameter("bias"), last["decoder.layers.linear.bias"][i].float())
    average.export("out", dtype=torch.bfloat16)
    average.export("same", format="same")
    for name, value in last.items():
        assert torch.equal(read(opened(working_directory / "out"), name, 0, value.numel()), value.reshape(-1))
        model_weight, copy = loaded(working_directory / "same", name, f"optimizer.state.fp32_param.{name}")
        assert torch.equal(model_weight, value) and torch.equal(copy, value.float())


def test_layers_and_experts_may_both_be_stacked(working_directory: Path) -> None:
    state = {"layers.experts.weight": torch.randn(2, 3, 4, 5)}
    for step in (1, 2):
        save(working_directory / f"iter_{step}", state)
    model = nn.Module()
    model.layers = nn.ModuleList(
        nn.ModuleDict({"experts": nn.ModuleList(nn.Linear(5, 4, False) for _ in range(3))}) for _ in range(2)
    )
    twa_scale.attach(model, "iter_*", {"center": "last"})
    for name, value in model.named_parameters():
        _, layer, _, expert, _ = name.split(".")
        assert torch.equal(value, state["layers.experts.weight"][int(layer), int(expert)])


def test_two_stacked_tensors_with_the_same_one_of_the_model_are_refused(working_directory: Path) -> None:
    for step in (1, 2):
        save(
            working_directory / f"iter_{step}",
            {"a.0.b.weight": torch.randn(1, 3, 3), "a.b.0.weight": torch.randn(1, 3, 3)},
        )
    model = nn.ModuleDict({"a": nn.ModuleList([nn.ModuleDict({"b": nn.ModuleList([nn.Linear(3, 3, False)])})])})
    with pytest.raises(CandidateError, match=r"both hold 'a\.0\.b\.0\.weight' of the model"):
        twa_scale.attach(model, "iter_*", {})
    twa_scale.attach(model, "iter_*", {"ignore": [r"^a\.b\."], "center": "last"})


def test_another_number_of_layers_is_refused(working_directory: Path) -> None:
    run(working_directory / "run")
    with pytest.raises(CandidateError, match=r"decoder\.layers\.0\.linear"):
        twa_scale.attach(Layers(LAYERS + 1), "run/*", {})
