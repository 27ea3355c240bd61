"""The shipped tasks on real data, and their messages for invalid input."""

import gzip
import importlib
import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tests.digits import load_digits
from tests.sentences import SENTENCES
from twa_scale.base.notices import TwaWarning
from twa_scale.config import TaskConfig
from twa_scale.errors import ConfigError
from twa_scale.run.tasks import SPLITS, Examples, Task, build_task, stack
from twa_scale.run.tasks.byte_gpt import ByteGPT
from twa_scale.run.tasks.data_files import Fractions, SplitFiles, data_files, split_files
from twa_scale.run.tasks.decoders import Square
from twa_scale.run.tasks.images import ImageFolder, class_names, read_npz
from twa_scale.run.tasks.tables import rows
from twa_scale.run.tasks.tokens import TokenFile

TINY_GPT = {"byte_gpt": {"n_layer": 2, "n_head": 2, "d_model": 32}}


def task_of(name: str, **options: object) -> Task:
    return build_task(TaskConfig.model_validate({"name": name, **options}))


def batch_of(examples: Examples, size: int) -> dict[str, torch.Tensor]:
    return stack([examples[i] for i in range(size)])


def first_loss_and_last(task: Task, split: str = "train", steps: int = 12, size: int = 16) -> tuple[float, float]:
    """Train for a few steps. Return the loss on the first batch before and after, with `loss` and `metrics`."""
    torch.manual_seed(0)
    model, data = task.model(), task.dataset(split)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    batch = batch_of(data, min(size, len(data)))
    before = task.loss(model.eval(), batch).item()
    for _ in range(steps):
        optimizer.zero_grad()
        task.loss(model, batch).backward()
        optimizer.step()
    total, count = task.metrics(model, batch)["loss"]
    assert total.item() / count == pytest.approx(task.loss(model, batch).item(), rel=1e-5)
    return before, total.item() / count


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    directory = tmp_path_factory.mktemp("llama")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<eos>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([Path(math.__doc__ or "math").name, *SENTENCES.values()], trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>").save_pretrained(directory)
    config = LlamaConfig(
        vocab_size=320,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    return str(directory)


@pytest.fixture
def digits(tmp_path: Path) -> Path:
    images, labels = load_digits()
    images = (images * 15.9).astype(np.uint8).reshape(-1, 1, 8, 8)
    arrays = {"train_images": images[:1000], "train_labels": labels[:1000]}
    path = tmp_path / "digits.npz"
    np.savez(path, **arrays, test_images=images[1000:], test_labels=labels[1000:])
    return path


@pytest.fixture
def mine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[str]:
    """Write a user's module that can be imported."""
    (tmp_path / "mine_for_twa.py").write_text(
        "from torch import nn\n"
        "def classifier(inputs=64, classes=10):\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(inputs, classes))\n"
        "def number(): return 3\n"
        "def task(data, *, size=2):\n"
        "    from twa_scale.run.tasks import build_task\n"
        "    from twa_scale.config import TaskConfig\n"
        "    options = {'data': data, 'model': 'mine_for_twa:classifier'}\n"
        "    return build_task(TaskConfig(name='image_classification', **options))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    yield "mine_for_twa"
    sys.modules.pop("mine_for_twa", None)


# The byte-level GPT


def test_gpt_is_causal() -> None:
    model = ByteGPT(context=16, n_layer=2, n_head=2, d_model=32)
    tokens = torch.randint(0, 256, (2, 16))
    changed = tokens.clone()
    changed[:, 9] = (changed[:, 9] + 1) % 256
    same = (model(tokens) - model(changed)).abs().amax((0, 2))
    assert model(tokens).shape == (2, 16, 256)
    assert same[:9].max() == 0 and same[9:].min() > 0


def test_gpt_has_no_buffers_and_can_be_built_without_memory() -> None:
    with torch.device("meta"):
        model = ByteGPT()
    assert not list(model.buffers())
    model.to_empty(device="cpu")
    model.init_weights()
    size = sum(parameter.numel() for parameter in model.parameters())
    assert 0.9e6 < size < 1.1e6
    loss = nn.functional.cross_entropy(model(torch.randint(0, 256, (1, 64)))[0], torch.randint(0, 256, (64,)))
    assert loss.item() == pytest.approx(math.log(256), abs=0.3)


# causal_lm


def test_causal_lm_learns_the_standard_library() -> None:
    task = task_of("causal_lm", model=TINY_GPT, text="stdlib", context=64)
    before, after = first_loss_and_last(task)
    assert after < before - 0.5
    metrics = task.metrics(task.model(), batch_of(task.dataset("test"), 3))
    assert metrics["loss"][1] == 3 * 64
    assert metrics["bits_per_byte"][0].item() == pytest.approx(metrics["loss"][0].item() / math.log(2))


def test_windows_hold_every_byte_once_and_in_order(tmp_path: Path) -> None:
    texts = [b"x" * 3, b"", b"0123456789", b"ab"]
    paths = [tmp_path / f"{i}.txt" for i in range(len(texts))]
    for path, text in zip(paths, texts, strict=True):
        path.write_bytes(text)
    task = task_of("causal_lm", model=TINY_GPT, text={"train": [str(path) for path in paths]}, context=3)
    windows = task.dataset("train")
    read = b"".join(bytes(windows[i]["tokens"].tolist()) for i in range(len(windows)))
    assert len(windows) == 3
    assert read == b"".join(texts)[:12]
    with pytest.raises(IndexError):
        windows[3]


def test_splits_are_disjoint_and_stable_when_files_are_added(tmp_path: Path) -> None:
    def files_of(number: int) -> dict[str, set[bytes]]:
        for i in range(number):
            (tmp_path / f"{i}.txt").write_bytes(b"%4d" % i)
        fractions = {"train": 0.5, "validation": 0.25, "test": 0.25}
        task = task_of("causal_lm", model=TINY_GPT, text=str(tmp_path), context=3, fractions=fractions)
        data = {split: task.dataset(split) for split in SPLITS}
        return {s: {bytes(d[i]["tokens"].tolist()) for i in range(len(d))} for s, d in data.items()}

    few, many = files_of(60), files_of(120)
    assert sum(len(texts) for texts in many.values()) == 120 == len(set().union(*many.values()))
    assert all(few[split] <= many[split] for split in SPLITS)
    assert 40 < len(many["train"]) < 80


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int32", "uint32", "int64"])
@pytest.mark.parametrize("suffix", [".npy", ".bin"])
def test_token_files_of_every_type(tmp_path: Path, dtype: str, suffix: str) -> None:
    tokens = np.arange(100).astype(dtype)
    path = tmp_path / f"tokens{suffix}"
    if suffix == ".npy":
        np.save(path, tokens)
    else:
        tokens.tofile(path)
    options = {"tokens": {"train": str(tmp_path)}, "token_dtype": dtype}
    task = task_of("causal_lm", model=TINY_GPT, context=9, **options)
    data = task.dataset("train")
    assert len(data) == 10
    assert data[7]["tokens"].tolist() == list(range(70, 80))


@pytest.mark.parametrize("dtype", ["int8", "int16", ">u2", ">i8", "uint64"])
def test_token_arrays_of_other_types_and_in_rows(tmp_path: Path, dtype: str) -> None:
    np.save(tmp_path / "tokens.npy", np.arange(100).astype(dtype).reshape(5, 2, 10))
    data = task_of("causal_lm", model=TINY_GPT, context=9, tokens={"train": str(tmp_path)}).dataset("train")
    assert [data[i]["tokens"].tolist() for i in (0, 7)] == [list(range(10)), list(range(70, 80))]


def test_causal_lm_with_a_hugging_face_model(llama: str, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\n".join(SENTENCES.values()) * 20)
    task = task_of("causal_lm", model=llama, text={"train": str(tmp_path / "*.txt")}, context=32)
    before, after = first_loss_and_last(task)
    assert after < before - 0.3
    assert set(task.metrics(task.model(), batch_of(task.dataset("train"), 2))) == {"loss"}
    assert {p.dtype for p in task.model().parameters()} == {torch.float32}


def counted(sizes: list[int], tensor: Tensor) -> Tensor:
    sizes.append(tensor.nbytes)
    return tensor


@pytest.mark.parametrize("kind", ["byte_gpt", "llama"])
def test_recomputing_changes_no_gradient_and_keeps_less(llama: str, tmp_path: Path, kind: str) -> None:
    (tmp_path / "a.txt").write_text("\n".join(SENTENCES.values()) * 20)
    options = {"model": llama if kind == "llama" else kind, "text": {"train": str(tmp_path / "*.txt")}, "context": 32}
    gradients, kept = [], []
    for recompute in (False, True):
        task = task_of("causal_lm", recompute_activations=recompute, **options)
        torch.manual_seed(0)
        model, sizes = task.model().train(), list[int]()
        with torch.autograd.graph.saved_tensors_hooks(partial(counted, sizes), lambda tensor: tensor):
            loss = task.loss(model, batch_of(task.dataset("train"), 2))
        loss.backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
        kept.append(sum(sizes))
    assert kept[1] < 0.7 * kept[0]
    for first, second in zip(*gradients, strict=True):
        torch.testing.assert_close(first, second)


# sequence_classification


def write_tables(directory: Path, rows: list[tuple[str, str]]) -> dict[str, str]:
    lines = [json.dumps({"sentence": SENTENCES[kind], "mood": label}) for kind, label in rows]
    (directory / "train.jsonl").write_text("\n".join(lines) + "\n")
    table = "".join(f'"{SENTENCES[kind]}",{label}\n' for kind, label in rows[:2])
    (directory / "validation.csv").write_text("sentence,mood\n" + table)
    return {"train": str(directory / "train.jsonl"), "validation": str(directory / "validation.csv")}


def test_sequence_classification_learns_named_labels(bert: str, tmp_path: Path) -> None:
    paths = write_tables(tmp_path, [("good", "up"), ("bad", "down"), ("odd", "none")] * 4)
    options = {"model": bert, "text": "sentence", "label": "mood", "max_length": 16}
    task = task_of("sequence_classification", **options, **paths)
    before, after = first_loss_and_last(task, steps=20)
    assert after < before / 2
    example = task.dataset("validation")[0]
    assert example["labels"] == 2  # of down, none, up
    assert example["input_ids"].shape == example["attention_mask"].shape == (16,)
    metrics = task.metrics(task.model(), batch_of(task.dataset("validation"), 2))
    assert metrics["accuracy"][1] == 2 and 0 <= metrics["accuracy"][0] <= 2


def test_padding_changes_nothing(bert: str, tmp_path: Path) -> None:
    paths = write_tables(tmp_path, [("good", "0"), ("bad", "1"), ("odd", "0")])
    options = {"model": bert, "text": "sentence", "label": "mood"}
    short, long = (task_of("sequence_classification", **options, **paths, max_length=n) for n in (16, 48))
    model = short.model().eval()
    losses = [task.loss(model, batch_of(task.dataset("train"), 3)).item() for task in (short, long)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_labels_have_the_ids_of_the_model_configuration(bert: str, tmp_path: Path) -> None:
    paths = write_tables(tmp_path, [("good", "up"), ("bad", "down")])
    config = json.loads(Path(bert, "config.json").read_text())
    config |= {
        "label2id": {"up": 0, "level": 1, "down": 2},
        "id2label": {"0": "up", "1": "level", "2": "down"},
    }
    for file in Path(bert).iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "config.json").write_text(json.dumps(config))
    task = task_of("sequence_classification", model=str(tmp_path), text="sentence", label="mood", **paths)
    assert [task.dataset("train")[i]["labels"].item() for i in range(2)] == [0, 2]
    model: Any = task.model()
    assert model.config.num_labels == 3


# image_classification


def test_image_classification_learns_the_digits(digits: Path, mine: str) -> None:
    options = {"mean": [0.3], "std": [0.4]}
    task = task_of("image_classification", data=str(digits), model=f"{mine}:classifier", **options)
    before, after = first_loss_and_last(task, steps=60, size=1000)
    assert after < before / 2
    assert task.dataset("train")[0]["images"].shape == (1, 8, 8)
    assert len(task.dataset("test")) == 797


def test_signals_keep_their_shape_and_values(tmp_path: Path, mine: str) -> None:
    signals = np.random.default_rng(0).normal(size=(20, 40)).astype(">f8")
    np.savez(tmp_path / "one.npz", images=signals, labels=np.arange(20) % 4)
    options = {"model_options": {"inputs": 40, "classes": 4}, "validation": str(tmp_path / "one.npz")}
    task = task_of("image_classification", model=f"{mine}:classifier", **options)
    assert np.allclose(task.dataset("validation")[3]["images"].numpy(), signals[3])
    assert task.loss(task.model(), batch_of(task.dataset("validation"), 20)).item() > 0


def test_image_folder(tmp_path: Path, mine: str) -> None:
    image = pytest.importorskip("PIL.Image")
    for name, color in (("cat", (255, 0, 0)), ("dog", (0, 0, 255))):
        (tmp_path / "train" / name).mkdir(parents=True)
        for i in range(3):
            image.new("RGB", (20 + i, 12), color).save(tmp_path / "train" / name / f"{i}.png")
    options = {"model_options": {"inputs": 192, "classes": 2}, "image_size": 8}
    task = task_of("image_classification", train=str(tmp_path / "train"), model=f"{mine}:classifier", **options)
    data = task.dataset("train")
    assert len(data) == 6 and data[5]["labels"] == 1
    assert data[5]["images"][:, 4, 4].tolist() == [0, 0, 255]
    before, after = first_loss_and_last(task)
    assert after < before


# A custom task


def test_custom_task_by_import_path(digits: Path, mine: str) -> None:
    task = task_of(f"{mine}:task", data=str(digits))
    assert isinstance(task, Task)
    assert len(task.dataset("train")) == 1000


# Invalid input


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({"name": "causal_ml"}, ["causal_ml", "did you mean 'causal_lm'"]),
        ({"name": "nowhere_at_all:task"}, ["nowhere_at_all", "PYTHONPATH"]),
        ({"name": "mine_for_twa:tusk"}, ["tusk", "did you mean 'task'"]),
        ({"name": "mine_for_twa:number"}, ["int", "lacks model, dataset, loss, metrics"]),
        (
            {"name": "mine_for_twa:task", "data": "x", "sise": 3},
            ["sise", "did you mean 'size'", "data, size"],
        ),
        ({"name": "mine_for_twa:task"}, ["missing", "data"]),
        ({"name": "causal_lm"}, ["exactly one of `text`, `tokens`, `chat` and `sources`"]),
        ({"name": "causal_lm", "text": "stdlib", "contxt": 3}, ["task", "contxt", "did you mean 'context'"]),
        (
            {"name": "causal_lm", "text": "stdlib", "model": {"byte_gpt": {"layers": 3}}},
            ["layers", "n_layer"],
        ),
        ({"name": "causal_lm", "text": "stdlib", "model": {"byte_gpt": {"n_head": 3}}}, ["128", "n_head 3"]),
        ({"name": "causal_lm", "text": {"valid": "a"}}, ["text.valid", "did you mean 'validation'"]),
        ({"name": "causal_lm", "text": "nowhere/*.txt"}, ["task.text", "nowhere/*.txt", "matches no file"]),
        ({"name": "causal_lm", "text": "stdlib", "fractions": {"train": 0.5}}, ["do not sum to 1"]),
        (
            {"name": "causal_lm", "text": "stdlib", "model": "nowhere"},
            ["task.model", "nowhere", "config.json"],
        ),
        ({"name": "image_classification", "model": "mine_for_twa:number"}, ["`data`"]),
        ({"name": "image_classification", "model": "m:f", "data": "a", "train": "b"}, ["`data`"]),
        ({"name": "image_classification", "model": "mine_for_twa:number", "data": "gone.npz"}, ["gone.npz"]),
        ({"name": "image_classification", "model": "mine_for_twa:number", "data": "."}, ["subfolder train"]),
        ({"name": "image_classification", "model": "mine_for_twa:number", "data": "~no-one/a"}, ["Write the path out"]),
        ({"name": "image_classification", "model": "mine_for_twa:number", "test": "~no-one/a"}, ["Write the path out"]),
        ({"name": "image_classification", "model": "mine_for_twa:number", "test": "x" * 5000}, ["name too long"]),
        ({"name": "causal_lm", "text": "stdlib", "model": "~no-one/a"}, ["Write the path out"]),
        ({"name": "causal_lm", "text": "stdlib", "model": "x" * 5000}, ["name too long"]),
        ({"name": "sequence_classification", "model": "m", "test": "~no-one/a.csv"}, ["Write the path out"]),
        ({"name": "sequence_classification", "model": "m"}, ["at least one of"]),
        ({"name": "sequence_classification", "model": "m", "train": "a.xlsx"}, ["task.train", ".jsonl", ".parquet"]),
        ({"name": "sequence_classification", "model": "m", "test": "gone.csv"}, ["task.test", "gone.csv"]),
        ({"name": "sequence_classification", "model": "m", "test": "gone.parquet"}, ["task.test", "gone.parquet"]),
    ],
)
def test_refusals_name_the_key_and_the_fix(section: dict[str, object], words: list[str], mine: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build_task(TaskConfig.model_validate(section))
    assert "?." not in str(caught.value)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_splits_without_data(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"abc")
    task = task_of("causal_lm", model=TINY_GPT, text={"train": str(tmp_path / "a.txt")}, context=8)
    with pytest.raises(ConfigError, match=r"split 'train'.*1 files with 3 tokens"):
        task.dataset("train")
    with pytest.raises(ConfigError, match=r"split 'test'.*0 files"):
        task.dataset("test")
    with pytest.raises(ConfigError, match="did you mean 'validation'"):
        task.dataset("valid")


def test_named_pipes_are_refused(tmp_path: Path) -> None:
    """They would block their reader."""
    (tmp_path / "x").mkdir()
    for name in ("a.csv", "a.npz", "x/a.png"):
        os.mkfifo(tmp_path / name)
    for read in (
        lambda: next(rows(tmp_path / "a.csv", {"task.text": "text"}, "task.train")),
        lambda: read_npz(tmp_path / "a.npz", "", "task.data"),
        lambda: ImageFolder(tmp_path, {"x": 0}, Square(4), "task.data")[0],
    ):
        with pytest.raises(ConfigError, match=r"a\.(csv|npz|png): cannot be read: it is a named pipe"):
            read()


def test_one_file_cannot_be_divided(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"abc" * 100)
    fractions = {"train": 1.0, "validation": 0.0, "test": 0.0}
    task = task_of("causal_lm", model=TINY_GPT, text=str(tmp_path / "a.txt"), context=8, fractions=fractions)
    assert len(task.dataset("train"))
    with pytest.raises(ConfigError, match=r"split 'validation': 0 files of 1.*whole files"):
        task.dataset("validation")


@pytest.mark.parametrize("name", ["a.feather", "A.PKL", "a.idx", "a.txt.gz", "a.npy", "a.bin", "a.tar"])
def test_suffixes_of_other_formats_are_refused_as_text(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"abc" * 100)
    with pytest.raises(ConfigError, match=f"{name}.*suffix"):
        task_of("causal_lm", model=TINY_GPT, text={"train": str(tmp_path)}, context=8).dataset("train")


def test_compressed_files_are_refused_as_text(tmp_path: Path) -> None:
    for i, content in enumerate([b"%PDF-1.7\n" + b"x" * 99, gzip.compress(b"text"), b"PK\x03\x04" + b"x" * 99]):
        (tmp_path / f"{i}.txt").write_bytes(content)
        with pytest.raises(ConfigError, match=rf"{i}\.txt: is not plain text: it begins like"):
            task_of("causal_lm", model=TINY_GPT, text={"train": str(tmp_path / f"{i}.txt")}, context=2).dataset("train")


def test_data_that_cannot_be_found_or_read(tmp_path: Path) -> None:
    """Nothing is skipped without a message, because a part of the data would be missing."""
    folder = tmp_path / "run[1]"
    (folder / "deep").mkdir(parents=True)
    (folder / "a.txt").write_text("text " * 9)
    (folder / "again").symlink_to(".")
    (folder / "once-more").symlink_to(".")
    for spec in (f"{folder}/*.txt", f"{folder}/**/*.txt", f"{folder}/**", str(folder)):
        task = task_of("causal_lm", model=TINY_GPT, text={"train": spec}, context=4)
        assert len(task.dataset("train")) == 9
    (folder / "deep/b.txt").symlink_to("nothing")
    os.mkfifo(folder / "c.txt")
    for spec, messages in {
        "": "not a path",
        "~nobody-of-this-name/a": "Write the path out",
        "x" * 5000: "File name too long",
        str(folder): "deep/b.txt: is a dangling link",
        f"{folder}/*/*.txt": "deep/b.txt: is a dangling link",
        f"{folder}/c.txt": "matches no file",
    }.items():
        with pytest.raises(ConfigError, match=messages):
            task_of("causal_lm", model=TINY_GPT, text={"train": spec}, context=4)


def test_data_behind_links_are_read_once(tmp_path: Path) -> None:
    """Splits depend on names, so a second name must not put a file into two of them."""
    for name in ("data/deep/a.txt", "elsewhere/b.txt", "data/lost+found/c.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "data/wiki").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere/circle").symlink_to(tmp_path / "data")

    def found(spec: str) -> list[Path]:
        splits = split_files(SplitFiles.model_validate(spec), Fractions(), 0, (".txt",), "task.text")
        return sorted(path for paths in splits.values() for path in paths)

    once = [tmp_path / "data/deep/a.txt", tmp_path / "data/wiki/b.txt"]
    assert found(f"{tmp_path}/data") == found(f"{tmp_path}/data/**/*.txt") == once
    (tmp_path / "data/0.txt").symlink_to("deep/a.txt")
    os.link(tmp_path / "data/deep/a.txt", tmp_path / "data/deep/b.txt")
    for spec in (f"{tmp_path}/data", f"{tmp_path}/data/**/*.txt"):
        with pytest.warns(TwaWarning, match=r"task\.text: .*0\.txt' leads to the same file as .*a\.txt' \(and 1 more"):
            assert found(spec) == once


def test_dangling_links_with_a_data_suffix_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.npy").write_bytes(b"")
    (tmp_path / "wiki").symlink_to("/nowhere/wiki")
    with pytest.warns(TwaWarning, match="wiki: is a dangling link"):
        assert data_files(tmp_path, (".npy",)) == [tmp_path / "a.npy"]
    (tmp_path / "b.npy").symlink_to("b.npy")
    with pytest.warns(TwaWarning), pytest.raises(ConfigError, match=r"b\.npy: is a dangling link"):
        data_files(tmp_path, (".npy",))


def test_image_folders_behind_links(tmp_path: Path) -> None:
    pytest.importorskip("PIL.Image")
    for name in ("data/cat/0.png", "elsewhere/deep/1.png", "data/.hidden/2.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "data/dog").symlink_to(tmp_path / "elsewhere")
    assert class_names(tmp_path / "data", "task.train") == ["cat", "dog"]
    assert len(ImageFolder(tmp_path / "data", {"cat": 0, "dog": 1, "only in train": 2}, Square(4), "task.train")) == 2
    (tmp_path / "elsewhere/deep/3.png").symlink_to("nothing")
    with pytest.raises(ConfigError, match=r"dog/deep/3\.png: is a dangling link"):
        ImageFolder(tmp_path / "data", {"cat": 0, "dog": 1}, Square(4), "task.train")
    (tmp_path / "data/mouse").symlink_to("/nowhere/mouse")
    with pytest.raises(ConfigError, match="mouse: is a dangling link"):
        class_names(tmp_path / "data", "task.train")


def test_data_without_read_permission(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    pytest.importorskip("PIL.Image")
    (tmp_path / "images/cat/deep").mkdir(parents=True)
    np.zeros(99, np.uint16).tofile(tmp_path / "t.bin")
    for folder in (tmp_path, *tmp_path.parents[:3], tmp_path / "images", tmp_path / "images/cat"):
        folder.chmod(0o777)
    for closed in (tmp_path / "t.bin", tmp_path / "images/cat/deep"):
        closed.chmod(0)
    request.getfixturevalue("nobody")
    options = {"model": TINY_GPT, "tokens": {"train": str(tmp_path / "t.bin")}, "context": 4}
    for dtype in ("uint8", "uint16", "uint32"):
        with pytest.raises(ConfigError, match=r"t\.bin: cannot be read: Permission denied\. Make it"):
            task_of("causal_lm", token_dtype=dtype, **options).dataset("train")
    for read in (
        lambda: ImageFolder(tmp_path / "images", {"cat": 0}, Square(4), "task.train"),
        lambda: class_names(tmp_path / "images/cat/deep", "task.train"),
        lambda: task_of("causal_lm", model=TINY_GPT, text={"train": str(tmp_path / "images")}),
    ):
        with pytest.raises(ConfigError, match=r"deep: cannot be read: Permission denied\. Make it readable"):
            read()


def test_files_in_two_splits_are_reported(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text " * 9)
    (tmp_path / "b.txt").symlink_to("a.txt")
    for other in ("a.txt", "b.txt"):
        text = {"train": str(tmp_path / "a.txt"), "validation": str(tmp_path / other)}
        with pytest.warns(TwaWarning, match=rf"{other}' of split 'validation' is .*a\.txt' of split 'train'"):
            task_of("causal_lm", model=TINY_GPT, text=text, context=4)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"plain text, " * 20, "plain text"),
        (b"\x93NUMPY" + bytes(100), "a numpy array"),
        (b"PK\x03\x04" + bytes(100), "an archive"),
        (gzip.compress(b"text", mtime=0), "a compressed file"),
        (b"MMIDIDX\0\0" + bytes(100), "an index of Megatron-LM"),
    ],
)
def test_bin_files_of_other_formats_are_refused(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "t.bin").write_bytes(content)
    with pytest.raises(ConfigError, match=rf"t\.bin: is not a plain sequence of tokens, but .*{message}"):
        task_of("causal_lm", model=TINY_GPT, tokens={"train": str(tmp_path / "t.bin")}, context=4).dataset("train")
    bytewise = {"tokens": {"train": str(tmp_path / "t.bin")}, "token_dtype": "uint8"}
    assert task_of("causal_lm", model=TINY_GPT, context=4, **bytewise).dataset("train")


def test_token_may_equal_the_first_two_bytes_of_gzip(tmp_path: Path) -> None:
    tokens = np.array([0x8B1F, 300, 0x8B1F, 40_000], np.uint16)
    tokens.tofile(tmp_path / "t.bin")
    assert np.array_equal(TokenFile.open(tmp_path / "t.bin", "uint16").read(0, 4), tokens)


@pytest.mark.parametrize("content", ["text".encode("utf-16"), b"\x7fELF\x02\x01\x00", b"abc\0" * 50])
def test_binary_content_is_refused_as_text(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(ConfigError, match=r"a\.txt.*zero bytes"):
        task_of("causal_lm", model=TINY_GPT, text={"train": str(tmp_path / "a.txt")}, context=2).dataset("train")


@pytest.mark.parametrize("name", ["a.pt", "a.txt", "tokens"])
def test_files_of_other_suffixes_are_refused_as_tokens(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"abc" * 100)
    with pytest.raises(ConfigError, match=rf"{name}.*\.npy or \.bin.*task\.text"):
        task_of("causal_lm", model=TINY_GPT, tokens={"train": str(tmp_path / name)}, context=8).dataset("train")


def test_any_file_can_hold_uint8_tokens(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_bytes(b"0123456789" * 3)
    options = {"model": TINY_GPT, "tokens": {"train": str(tmp_path / "a.py")}, "context": 9}
    data = task_of("causal_lm", token_dtype="uint8", **options).dataset("train")
    assert bytes(data[2]["tokens"].tolist()) == b"0123456789"


@pytest.mark.parametrize("wide", ["uint32", "int32", "int64"])
def test_wide_tokens_are_not_read_as_narrow_ones(llama: str, tmp_path: Path, wide: str) -> None:
    np.random.default_rng(0).integers(0, 60, 500).astype(wide).tofile(tmp_path / "t.bin")
    options = {"model": llama, "tokens": {"train": str(tmp_path / "t.bin")}, "context": 8}
    with pytest.raises(ConfigError, match=r"t\.bin.*every second.*task\.token_dtype"):
        task_of("causal_lm", **options).dataset("train")
    assert len(task_of("causal_lm", token_dtype=wide, **options).dataset("train")) == 500 // 9


def test_large_vocabulary_requires_the_token_dtype(llama: str, tmp_path: Path) -> None:
    config = json.loads((Path(llama) / "config.json").read_text()) | {"vocab_size": 70_000}
    (tmp_path / "config.json").write_text(json.dumps(config))
    np.arange(69_000, 70_000).astype(np.uint32).tofile(tmp_path / "t.bin")
    options = {"model": str(tmp_path), "tokens": {"train": str(tmp_path / "t.bin")}, "context": 9}
    with pytest.raises(ConfigError, match=r"t\.bin.*70000.*task\.token_dtype"):
        task_of("causal_lm", **options).dataset("train")
    assert task_of("causal_lm", token_dtype="uint32", **options).dataset("train")[99]["tokens"][-1] == 69_999


@pytest.mark.parametrize(("at", "value"), [(0, 256), (999, -1), (503, 1 << 40)])
def test_a_token_outside_the_vocabulary_is_found_with_its_position(tmp_path: Path, at: int, value: int) -> None:
    tokens = np.zeros(1000, np.int64)
    tokens[at] = value
    np.save(tmp_path / "t.npy", tokens)
    with pytest.raises(ConfigError, match=rf"t\.npy: position {at}: token {value};.*0 to 255"):
        data = task_of("causal_lm", model=TINY_GPT, tokens={"train": str(tmp_path / "t.npy")}, context=9).dataset(
            "train"
        )
        data[at // 10]


def test_a_wrong_type_is_found_before_the_first_step(tmp_path: Path) -> None:
    np.random.default_rng(0).integers(0, 256, 4000).astype(np.uint16).tofile(tmp_path / "t.bin")
    options = {"model": TINY_GPT, "tokens": {"train": str(tmp_path / "t.bin")}, "context": 9}
    with pytest.raises(ConfigError, match=r"t\.bin: position 0: token \d+;"):
        task_of("causal_lm", token_dtype="uint32", **options).dataset("train")


def test_tokens_outside_the_vocabulary(tmp_path: Path) -> None:
    np.save(tmp_path / "t.npy", np.full(100, 300, dtype=np.int32))
    task = task_of("causal_lm", model=TINY_GPT, tokens={"train": str(tmp_path / "t.npy")}, context=8)
    with pytest.raises(ConfigError, match=r"t\.npy.*300.*0 to 255"):
        task.dataset("train")[2]


@pytest.mark.parametrize("content", [b"garbage", b"\x93NUMPY\x01\x00"])
def test_token_files_that_cannot_be_read(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "t.npy").write_bytes(content)
    task = task_of("causal_lm", model=TINY_GPT, tokens={"train": str(tmp_path / "t.npy")})
    with pytest.raises(ConfigError, match=r"t\.npy"):
        task.dataset("train")


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("a.csv", "sentence,label\nfine,1\n", ["a.csv, line 2", "'text'", "sentence"]),
        ("a.csv", "text,label\nfine\n", ["a.csv, line 2", "no value in column 'label'. Fill it in"]),
        ("a.csv", "text,label\nfine, is it,1\n", ["a.csv, line 2", "more values than the 2 columns", "Quote"]),
        ("a.csv", "text,text,label\na,b,1\n", ["two columns called 'text'"]),
        ("a.CSV", "sentence,label\nfine,1\n", ["a.CSV, line 2", "'text'"]),
        ("a.csv", "text,label\n", ["holds no examples"]),
        ("a.csv", "text,label\nfine,-1\n", ["label -1", "a.csv"]),
        ("a.jsonl", '{"text": "fine", "label": 1}\n{"text": "fine"\n', ["a.jsonl, line 2", "not JSON"]),
        ("a.jsonl", '{"text": "fine", "label": 1}\n{"text": "fine"}\n', ["a.jsonl, line 2", "'label'"]),
        ("a.jsonl", "[1, 2]\n", ["line 1", "list"]),
        ("a.csv", "text,label\nfine,1\nfine,\n", ["a.csv, line 3: '' is not a label"]),
        ("a.jsonl", '{"text": "fine", "label": NaN}\n', ["line 1: nan is not a label"]),
        ("a.jsonl", '{"text": "fine", "label": [1]}\n', ["line 1: [1] is not a label"]),
        ("a.jsonl", '{"text": ["fine"], "label": 1}\n', ["line 1: ['fine'] is not a text"]),
        ("a.csv", b"text,label\n\xff\xfe,1\n", ["a.csv", "cannot be read"]),
    ],
)
def test_tables_that_cannot_be_used(
    bert: str, tmp_path: Path, file: str, content: str | bytes, words: list[str]
) -> None:
    path = tmp_path / file
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConfigError) as caught:
        task_of("sequence_classification", model=bert, train=str(path))
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_labels_outside_the_training_data(bert: str, tmp_path: Path) -> None:
    for name, labels in (("train", ["up", "down"]), ("test", ["up", "donw"])):
        (tmp_path / f"{name}.csv").write_text("text,label\n" + "".join(f"fine,{label}\n" for label in labels))
    paths = {name: str(tmp_path / f"{name}.csv") for name in ("train", "test")}
    with pytest.raises(ConfigError, match=r"task\.test.*'donw'.*did you mean 'down'"):
        task_of("sequence_classification", model=bert, **paths)


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        (
            {"train_image": np.zeros((2, 3)), "train_labels": np.zeros(2, int)},
            ["train_images", "train_image"],
        ),
        ({"train_images": np.zeros((2, 3)), "train_labels": np.zeros(3, int)}, ["(2, 3)", "(3,)"]),
        ({"train_images": np.zeros((2, 3)), "train_labels": np.zeros(2)}, ["integer"]),
        ({"train_images": np.zeros((2, 3)), "train_labels": np.array(["a", "b"])}, ["d.npz"]),
        ({"train_images": np.array([{}, {}]), "train_labels": np.zeros(2, int)}, ["d.npz"]),
    ],
)
def test_arrays_that_cannot_be_used(tmp_path: Path, mine: str, arrays: dict[str, Any], words: list[str]) -> None:
    np.savez(tmp_path / "d.npz", **arrays)
    with pytest.raises(ConfigError) as caught:
        options = {"model": f"{mine}:classifier", "data": str(tmp_path / "d.npz")}
        task_of("image_classification", **options).dataset("train")
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_transformers_missing(bert: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ConfigError, match="pip install transformers"):
        task_of("causal_lm", text="stdlib", model=bert)


# Code that comes with a model


def test_code_of_a_model_directory_is_never_run(tmp_path: Path) -> None:
    """Every prompt is answered, so that a question whether to run code would run it."""
    directories = []
    for file in ("config.json", "tokenizer_config.json"):
        directory = tmp_path / file
        directory.mkdir()
        (directory / "own.py").write_text(f"open({str(directory / 'ran')!r}, 'w')\nclass Any:\n    pass\n")
        (directory / "config.json").write_text(json.dumps({"model_type": "of-its-own", "vocab_size": 8}))
        known = json.loads((directory / file).read_text()) if file == "config.json" else {"tokenizer_class": "Own"}
        auto_map = {"AutoConfig": "own.Any", "AutoModelForCausalLM": "own.Any", "AutoTokenizer": ["own.Any", None]}
        (directory / file).write_text(json.dumps({**known, "auto_map": auto_map}))
        directories.append(directory)
    program = """
import sys
from twa_scale.errors import ConfigError
from twa_scale.run.tasks import huggingface
for directory in sys.argv[1:]:
    for loads in (huggingface.load_config, huggingface.load_tokenizer):
        try:
            loads(directory)
        except ConfigError as error:
            print(error)
    print("end of a directory")
"""
    command = [sys.executable, "-c", program, *map(str, directories)]
    done = subprocess.run(command, input="y\n" * 100, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    *messages, rest = done.stdout.split("end of a directory\n")
    assert rest == "" and "trust_remote_code" not in done.stdout
    for directory, text in zip(directories, messages, strict=True):
        assert not (directory / "ran").exists()
        assert "needs Python code that comes with it" in text
