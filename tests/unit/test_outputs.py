"""Outputs have the file names that loaders expect, hold their provenance, and can be loaded."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import twa_scale
from twa_scale import TwaWarning
from twa_scale.candidates.carry_over import CarriedFiles
from twa_scale.merge import average_fixed
from twa_scale.output.formats import SafetensorsFormat
from twa_scale.output.options import OutputOptions
from twa_scale.output.provenance import provenance, writing_options

SMALL = {"a": torch.ones(4), "b": torch.ones(4)}


def written(file: Path, scale: float = 1.0, **metadata: str) -> Path:
    """Write a file of weights, or an index with two files, and a config in the same directory."""
    file.parent.mkdir(parents=True, exist_ok=True)
    state = {name: value * scale for name, value in SMALL.items()}
    if file.name.endswith(".index.json"):
        positions = {name: f"{file.name.split('.')[0]}-{i}.safetensors" for i, name in enumerate(state)}
        for name, place in positions.items():
            save_file({name: state[name]}, file.parent / place, metadata)
        file.write_text(json.dumps({"weight_map": positions}))
    elif file.suffix == ".safetensors":
        save_file(state, file, metadata)
    else:
        torch.save(state, file)
    (file.parent / "settings.json").write_text("{}")
    return file.parent


def average(candidates: list[Path], out: Path, **options: Any) -> set[str]:
    average_fixed(list(map(str, candidates)), out, **options)
    return {path.name for path in out.iterdir()} - {"twa_scale.json", "README.md"}


@pytest.mark.parametrize(
    ("name", "becomes"),
    [
        ("model.safetensors", "model.safetensors"),
        ("pytorch_model.bin", "model.safetensors"),
        ("adapter_model.safetensors", "adapter_model.safetensors"),
        ("adapter_model.bin", "adapter_model.safetensors"),
        ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.safetensors"),
        ("diffusion_pytorch_model.safetensors.index.json", "diffusion_pytorch_model.safetensors"),
        ("open_clip_pytorch_model.safetensors", "open_clip_pytorch_model.safetensors"),
        ("open_clip_pytorch_model.bin", "open_clip_pytorch_model.safetensors"),
        ("of-my-own.v2.safetensors", "of-my-own.v2.safetensors"),
    ],
)
def test_names_of_files(tmp_path: Path, name: str, becomes: str) -> None:
    directories = [written(tmp_path / f"step-{i}" / name, i + 1) for i in range(2)]
    assert average(directories, tmp_path / "out") == {becomes, "settings.json"}
    files = [directory / name for directory in directories]
    assert becomes in average(files, tmp_path / "of-files")
    model = nn.ParameterDict({name: nn.Parameter(value) for name, value in SMALL.items()})
    twa_scale.attach(model, files).export(tmp_path / "exported")
    assert (tmp_path / "exported" / becomes).exists()


@pytest.mark.parametrize(
    ("weights", "norms", "message", "becomes"),
    [
        (("bfloat16", "bfloat16"), ("float32", "bfloat16"), "bfloat16", "bfloat16"),
        (("bfloat16", "bfloat16"), ("float32", "bfloat16"), "float32", "float32"),
        (("float32", "bfloat16"), ("bfloat16", "bfloat16"), "bfloat16", "float32"),
    ],
)
def test_config_has_the_type_of_most_weights(
    tmp_path: Path, weights: tuple[str, str], norms: tuple[str, str], message: str, becomes: str
) -> None:
    """The type is that of most elements. A few wider tensors must not double the memory of loaders."""
    for i, (weight, norm) in enumerate(zip(weights, norms, strict=True)):
        (tmp_path / f"{i}").mkdir()
        state = {"w": torch.ones(64, dtype=getattr(torch, weight)), "norm": torch.ones(4, dtype=getattr(torch, norm))}
        save_file(state, tmp_path / f"{i}/model.safetensors")
        (tmp_path / f"{i}/config.json").write_text(json.dumps({"dtype": message}))
    average([tmp_path / "0", tmp_path / "1"], tmp_path / "out")
    assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == becomes


def test_the_precision_in_a_name_is_that_of_the_output(tmp_path: Path) -> None:
    """Diffusers looks for the name with a precision only if its variant is asked for. A broken config.json is kept."""
    for i in range(2):
        (tmp_path / f"{i}").mkdir()
        save_file({"w": torch.ones(4).half()}, tmp_path / f"{i}/diffusion_pytorch_model.fp16.safetensors")
        (tmp_path / f"{i}/config.json").write_text('{"dtype": "float16"')
    for dtype, name in (None, "fp16.safetensors"), ("float32", "safetensors"), ("bfloat16", "safetensors"):
        with pytest.warns(TwaWarning, match="is not valid JSON"):
            average_fixed([str(tmp_path / "0"), str(tmp_path / "1")], tmp_path / f"out-{dtype}", dtype=dtype)
        assert (tmp_path / f"out-{dtype}/diffusion_pytorch_model.{name}").exists()


def test_names_for_candidates_in_one_directory(tmp_path: Path) -> None:
    for i in range(2):
        written(tmp_path / f"all/step-{i}.pt")
    assert average([tmp_path / "all/step-*.pt"], tmp_path / "out") == {"model.safetensors"}


@pytest.mark.parametrize("base", ["diffusion_pytorch_model", "adapter_model"])
def test_names_of_shards(tmp_path: Path, base: str) -> None:
    directories = [written(tmp_path / f"step-{i}/{base}.safetensors") for i in range(2)]
    names = average(directories, tmp_path / "out", max_shard_size=16)
    shards = {f"{base}-0000{i}-of-00002.safetensors" for i in (1, 2)}
    sharded = {f"{base}.safetensors.index.json", *shards}
    assert names - {"settings.json"} == (
        sharded if base.startswith("diff") else {f"{base}.safetensors"}
    )  # PEFT has no such file
    if base.startswith("diff"):
        index = json.loads((tmp_path / f"out/{base}.safetensors.index.json").read_text())
        assert set(index["weight_map"].values()) == shards
        assert average([tmp_path / "out"], tmp_path / "again") == {f"{base}.safetensors", "settings.json"}


def header(file: Path) -> dict[str, str]:
    with safe_open(file, "pt") as opened:
        actual: dict[str, str] = opened.metadata()
    return actual


def test_provenance(tmp_path: Path) -> None:
    paths = []
    for i in range(2):
        name = f"step-{i}/model.safetensors"
        paths.append(written(tmp_path / name, i + 1, ss_rank="8", model_hash="old", twa_scale="{}", format="np"))
    average(paths, tmp_path / "averaged", weights="ema:0.5", max_shard_size=16)
    model = nn.ParameterDict({name: nn.Parameter(value) for name, value in SMALL.items()})
    twa_scale.attach(model, paths, {"groups": "tensor"}).export(tmp_path / "exported")
    for out in (tmp_path / "averaged", tmp_path / "exported"):
        messages = json.loads((out / "twa_scale.json").read_text())
        assert messages["version"] == twa_scale.__version__ and messages["candidates"] == list(map(str, paths))
        assert messages.pop("files") == ["README.md", "settings.json"]
        for file in out.glob("*.safetensors"):
            actual = header(file)
            assert json.loads(actual.pop("twa_scale")) == messages
            assert actual == {"format": "pt", "ss_rank": "8"}
    assert json.loads((tmp_path / "averaged/twa_scale.json").read_text())["weights"] == pytest.approx([1 / 3, 2 / 3])
    messages = json.loads((tmp_path / "exported/twa_scale.json").read_text())
    assert messages["groups"] == ["a", "b"] and messages["coefficients"] == [[0.5, 0.5]] * 2
    assert messages["config"]["groups"] == "tensor"


def test_paths_that_are_not_utf8(tmp_path: Path) -> None:
    for i in range(2):
        written(tmp_path / f"step-\udcff{i}/model.safetensors", i)
    average([tmp_path / "step-\udcff0", tmp_path / "step-\udcff1"], tmp_path / "out")
    assert "step-\\udcff1" in (tmp_path / "out/README.md").read_text(encoding="utf-8")
    assert "step-\\udcff1" in json.loads(header(tmp_path / "out/model.safetensors")["twa_scale"])["candidates"][1]


def test_long_provenance_is_shortened_in_headers() -> None:
    origin = provenance("something", ["a", "b"], coefficients=[0.5] * 100_000)
    options = writing_options(CarriedFiles(), origin, OutputOptions(), SafetensorsFormat())
    messages = json.loads(options["metadata"]["twa_scale"])
    assert messages == {**provenance("something", ["a", "b"]), "more": "twa_scale.json"}
    assert len(json.loads(options["files"]["twa_scale.json"])["coefficients"]) == 100_000
    origin = provenance("something", ["a" * 100_000])
    options = writing_options(CarriedFiles(), origin, OutputOptions(), SafetensorsFormat())
    assert len(options["metadata"]["twa_scale"]) < 100


def test_export_needs_no_candidates(tmp_path: Path) -> None:
    paths = [written(tmp_path / f"step-{i}/adapter_model.safetensors", i, kept="yes") for i in range(2)]
    (paths[-1] / "folder").mkdir()
    (paths[-1] / "folder/vocab.json").write_text("[]")
    model = nn.ParameterDict({name: nn.Parameter(value) for name, value in SMALL.items()})
    twa = twa_scale.attach(model, paths)
    for path in paths:
        shutil.rmtree(path)
    for _ in range(2):  # an output with folders is replaced as a whole
        twa.export(tmp_path / "out", overwrite=True)
    assert header(tmp_path / "out/adapter_model.safetensors")["kept"] == "yes"
    assert (tmp_path / "out/settings.json").exists() and (tmp_path / "out/folder/vocab.json").read_text() == "[]"
    (tmp_path / "out/folder/notes.txt").write_text("a user's own")
    with pytest.raises(twa_scale.OutputError, match=r"'folder/notes\.txt'"):
        twa.export(tmp_path / "out", overwrite=True)


def test_code_is_copied_on_request(tmp_path: Path) -> None:
    paths = [written(tmp_path / f"step-{i}/model.safetensors", i) for i in range(2)]
    (paths[-1] / "modeling.py").write_text("")
    with pytest.warns(twa_scale.TwaWarning, match=r"'modeling\.py'.*carry_code"):
        average(paths, tmp_path / "without")
    assert "modeling.py" in average(paths, tmp_path / "with", carry_code=True)
    model = nn.ParameterDict({name: nn.Parameter(value) for name, value in SMALL.items()})
    twa_scale.attach(model, paths, {"carry_code": True}).export(tmp_path / "exported")
    assert (tmp_path / "exported/modeling.py").exists()


# Loaders


def perturbed(directory: Path, tmp_path: Path) -> list[Path]:
    """Return two candidates around a model that a library has saved: w - 1/64 and w + 1/64."""
    paths = []
    for i, change in enumerate((-1 / 64, 1 / 64)):
        paths.append(Path(shutil.copytree(directory, tmp_path / f"step-{i}")))
        (file,) = paths[-1].glob("*.safetensors")
        with safe_open(file, "pt") as opened:
            metadata = opened.metadata()
        state = {n: v + change if v.is_floating_point() else v for n, v in load_file(file).items()}
        save_file(state, file, metadata)
    return paths


def bert(directory: Path) -> Any:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=20, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16
    )
    model = transformers.BertModel(config)
    model.save_pretrained(directory)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *map(chr, range(97, 112))]
    (directory / "vocab.txt").write_text("\n".join(words))
    transformers.BertTokenizer(str(directory / "vocab.txt")).save_pretrained(directory)
    return model


def read_by_transformers(directory: Path) -> tuple[Any, Any]:
    transformers = pytest.importorskip("transformers")
    model = transformers.BertModel.from_pretrained(directory)
    return model, transformers.AutoTokenizer.from_pretrained(directory)("a b", return_tensors="pt")


def read_by_sentence_transformers(directory: Path) -> tuple[Any, Any]:
    sentence_transformers = pytest.importorskip("sentence_transformers")
    model = sentence_transformers.SentenceTransformer(str(directory), device="cpu")
    assert model.encode(["a b"]).shape == (1, 8)
    return model[0].auto_model, model.tokenizer(["a b"], return_tensors="pt")


def save_sentence_transformer(directory: Path) -> Any:
    """Write the published layout: the transformer at the top level, and a directory for each further module."""
    model = bert(directory)
    kinds = {"": "Transformer", "1_Pooling": "Pooling"}
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (path, kind) in enumerate(kinds.items())
    ]
    pooling = {"word_embedding_dimension": 8, "pooling_mode_mean_tokens": True}
    (directory / "1_Pooling").mkdir()
    contents = {"modules.json": modules, "1_Pooling/config.json": pooling, "sentence_bert_config.json": {}}
    for name, content in contents.items():
        (directory / name).write_text(json.dumps(content))
    return model


@pytest.mark.parametrize(
    ("save", "load"), [(bert, read_by_transformers), (save_sentence_transformer, read_by_sentence_transformers)]
)
@pytest.mark.parametrize("limit", ["5GB", 2000])
def test_loaders_read_outputs(
    tmp_path: Path, save: Callable[[Path], Any], load: Callable[[Path], Any], limit: str | int
) -> None:
    saved = save(tmp_path / "saved").state_dict()
    paths = perturbed(tmp_path / "saved", tmp_path)
    average(paths, tmp_path / "averaged", max_shard_size=limit)
    live, _ = load(paths[0])
    twa_scale.attach(live, paths).export(tmp_path / "exported", max_shard_size=limit)
    for out in ("averaged", "exported"):
        model, tokens = load(tmp_path / out)
        torch.testing.assert_close(model.state_dict(), saved)
        assert tokens["input_ids"].tolist() == load(paths[0])[1]["input_ids"].tolist()
