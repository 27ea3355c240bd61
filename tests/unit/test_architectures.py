"""transformers architectures in the documentation: candidates are read, and exports can be loaded."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import ConversionOps, WeightConverter

import twa_scale
from tests.architectures import ARCHITECTURES, Architecture
from tests.states import save_run
from twa_scale.errors import CandidateError
from twa_scale.merge import export_run


@contextmanager
def quiet() -> Iterator[None]:
    before = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers.utils.logging.set_verbosity(before)


def built(architecture: Architecture, seed: int) -> transformers.PreTrainedModel:
    if not hasattr(transformers, architecture.model):
        pytest.skip(f"transformers {transformers.__version__} has no {architecture.model}")
    config = getattr(transformers, architecture.config)(**architecture.settings)
    torch.manual_seed(seed)
    model: transformers.PreTrainedModel = getattr(transformers, architecture.model)(config)
    with torch.no_grad():
        for parameter in model.parameters():  # many are initialized with zero or one
            parameter.normal_()
        for module in model.modules():  # some classes set this row to zero again when they load
            if isinstance(module, torch.nn.Embedding) and module.padding_idx is not None:
                module.weight[module.padding_idx] = 0
    return model


def assert_same_files(written: Path, saved: Path, ties: Mapping[str, str]) -> None:
    """Check that a directory has the names and bits that `save_pretrained` has written, except for tied tensors."""
    actual, expected = (
        {ties.get(name, name): value for name, value in load_file(directory / "model.safetensors").items()}
        for directory in (written, saved)
    )
    assert actual.keys() == expected.keys()
    assert not [name for name, value in expected.items() if not torch.equal(value, actual[name])]


def cases() -> list[object]:
    marks = [() if item.common else (pytest.mark.grid,) for item in ARCHITECTURES]
    return [pytest.param(item, marks=mark, id=item.model) for item, mark in zip(ARCHITECTURES, marks, strict=True)]


@pytest.mark.parametrize("architecture", cases())
def test_candidates_are_read_as_from_pretrained_reads_them_and_it_reads_the_export(
    architecture: Architecture, tmp_path: Path
) -> None:
    with quiet():
        kind = getattr(transformers, architecture.model)
        paths = [tmp_path / f"step-{i}" for i in range(2)]
        for i, path in enumerate(paths):
            built(architecture, i).save_pretrained(path)
        for i, path in enumerate(paths):
            model = built(architecture, 2)
            average = twa_scale.attach(model, paths, {"center": i})
            loaded = kind.from_pretrained(path).state_dict()
            live = model.state_dict()
            wrong = [name for name in loaded if not torch.equal(live[name], loaded[name])]
            assert live.keys() == loaded.keys() and not wrong, wrong
            if i == 0:
                average.close()
        average.export(tmp_path / "out")
        average.close()
        snapshot = twa_scale.Snapshots(tmp_path / "snapshots", every_n_steps=1).step(model, 1)
        assert snapshot
        assert_same_files(tmp_path / "out", paths[-1], {})
        assert_same_files(snapshot, paths[-1], getattr(model, "all_tied_weights_keys", {}))
        exported, report = kind.from_pretrained(tmp_path / "out", output_loading_info=True)
        assert not any(report.values()), report
        repeated = exported.state_dict()
        wrong = [name for name in live if not torch.equal(live[name], repeated[name])]
        assert not wrong, wrong


@pytest.mark.parametrize(
    ("groups", "group"),
    [("tensor", "model.layers.1.mlp.experts.gate_up_proj"), ("expert", "model.layers.1.mlp.experts.1")],
)
@pytest.mark.filterwarnings("ignore:groups. expert:UserWarning")
def test_a_run_is_exported_in_the_form_of_its_candidates(groups: str, group: str, tmp_path: Path) -> None:
    (architecture,) = (item for item in ARCHITECTURES if item.model == "MixtralForCausalLM")
    with quiet():
        paths = [tmp_path / f"step-{i}" for i in range(2)]
        for i, path in enumerate(paths):
            built(architecture, i).save_pretrained(path)
        model = built(architecture, 2)
        average = twa_scale.attach(model, paths, {"groups": groups})
        assert group in average.layout.groups
        model(torch.arange(8).view(1, 8), labels=torch.arange(8).view(1, 8)).loss.backward()
        average.step()
        average.export(tmp_path / "out")
        save_run(average, paths, tmp_path / "run")
        export_run(tmp_path / "run", tmp_path / "exact")
    exported, exact, *stored = (
        load_file(path / "model.safetensors") for path in (tmp_path / "out", tmp_path / "exact", *paths)
    )
    assert exported.keys() == exact.keys() == stored[0].keys()
    for name, value in exact.items():
        torch.testing.assert_close(exported[name], value, rtol=1e-5, atol=1e-6)
    if groups == "expert":
        for i in range(2):
            name = f"model.layers.1.block_sparse_moe.experts.{i}.w2.weight"
            a = average.coefficients[:, average.layout.groups.index(f"model.layers.1.mlp.experts.{i}")].float()
            torch.testing.assert_close(exact[name], a[0] * stored[0][name] + a[1] * stored[1][name])
            assert abs(float(a[0]) - 0.5) > 1e-3


class HalvedWeight(transformers.LlamaForCausalLM):
    """A model whose files store half of a weight."""


class ComputingConversion(ConversionOps):
    """A conversion that computes instead of only moving elements."""

    def convert(self, input_dict: dict[str, Any], **_: object) -> dict[str, Any]:
        return {name: tensors[0] * 2 for name, tensors in input_dict.items()}


def test_conversion_that_computes_raises_with_a_fix(tmp_path: Path) -> None:
    rule = WeightConverter("half_norm.weight", "model.norm.weight", [ComputingConversion()])
    register_checkpoint_conversion_mapping("HalvedWeight", [rule], overwrite=True)
    (llama,) = (item for item in ARCHITECTURES if item.model == "LlamaForCausalLM")
    model = HalvedWeight(transformers.LlamaConfig(**llama.settings))
    paths = [tmp_path / f"{i}.pt" for i in range(2)]
    for path in paths:
        state = {name: value + torch.randn_like(value) for name, value in model.state_dict().items()}
        torch.save({name.replace("model.norm", "half_norm"): value for name, value in state.items()}, path)
    message = r"'model\.norm\.weight' of 'half_norm\.weight' by .*mul cannot be traced.*save_original_format"
    with pytest.raises(CandidateError, match=message):
        twa_scale.attach(model, paths)


def test_documentation_lists_tested_architectures() -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "reference" / "architectures.md").read_text()
    rows = [line.split("|")[1:3] for line in page.splitlines() if line.startswith("| ")][2:]
    assert [(kind.strip(), model.strip(" `")) for kind, model in rows] == [
        (item.kind, item.model) for item in ARCHITECTURES
    ]


def test_averages_learned_from_a_window_have_the_format_of_its_snapshots(tmp_path: Path) -> None:
    (architecture,) = (item for item in ARCHITECTURES if item.model == "MixtralForCausalLM")
    model = built(architecture, 0)
    running = twa_scale.RunningAverages(model, window={"every": 1, "keep": 2})
    for _ in range(2):
        with torch.no_grad():
            model.model.norm.weight.add_(1)
        running.step()
    average = running.learn()
    average.export(tmp_path / "out")
    saved = running.save(tmp_path / "window")[-1]
    out, snapshot = (load_file(directory / "model.safetensors") for directory in (tmp_path / "out", saved))
    assert {name: value.shape for name, value in out.items()} == {name: value.shape for name, value in snapshot.items()}
