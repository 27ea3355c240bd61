"""The data of `sequence_classification`: records, pairs of texts, and numbers to predict."""

import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
from transformers import AutoConfig, AutoTokenizer

from tests.sentences import SENTENCES
from twa_scale.base.notices import TwaWarning
from twa_scale.config import TaskConfig
from twa_scale.errors import ConfigError
from twa_scale.run.tasks import Task, build_task, stack

TABLE: dict[str, list[Any]] = {
    "a": list(SENTENCES.values()),
    "b": ["a lift", "loud", ""],
    "score": [0.5, -1.0, 2.0],
    "class": [1, 0, 1],
}


def task_of(model: str, **options: object) -> Task:
    section = {"name": "sequence_classification", "model": model, "max_length": 16, "text": "a", "label": "class"}
    return build_task(TaskConfig.model_validate(section | options))


def write(path: Path, table: dict[str, list[Any]]) -> str:
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pa.table(table), path)
    elif path.suffix == ".csv":
        rows = [table, *zip(*table.values(), strict=True)]
        path.write_text("".join(",".join(f'"{value}"' for value in row) + "\n" for row in rows))
    else:
        rows = [dict(zip(table, row, strict=True)) for row in zip(*table.values(), strict=True)]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl", "a.csv"])
def test_pairs_are_as_the_tokenizer_makes_them(bert: str, tmp_path: Path, name: str) -> None:
    task = task_of(bert, train=write(tmp_path / name, TABLE), text_pair="b")
    data = task.dataset("train")
    batch = stack([data[i] for i in range(3)])
    options = {"padding": "max_length", "truncation": True, "max_length": 16, "return_tensors": "pt"}
    expected = AutoTokenizer.from_pretrained(bert)(TABLE["a"], TABLE["b"], **options)
    assert set(batch) == {"labels", *expected}
    for key, value in expected.items():
        assert torch.equal(batch[key], value), key
    assert data.token_counts.tolist() == batch["attention_mask"].sum(1).tolist()  # type: ignore[attr-defined]
    assert batch["token_type_ids"].any() and batch["labels"].tolist() == [1, 0, 1]
    model = task.model().eval()
    assert task.loss(model, batch).item() == pytest.approx(model(**batch).loss.item(), rel=1e-5)


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl", "a.csv"])
@pytest.mark.parametrize("set_by", [{"problem": "regression"}, {"num_labels": 1}])
def test_regression(bert: str, tmp_path: Path, name: str, set_by: dict[str, object]) -> None:
    task = task_of(bert, train=write(tmp_path / name, TABLE), label="score", **set_by)
    data, model = task.dataset("train"), task.model().eval()
    batch = stack([data[i] for i in range(3)])
    assert batch["labels"].tolist() == TABLE["score"] and batch["labels"].dtype == torch.float32
    outputs = model(**batch)
    assert outputs.logits.shape == (3, 1)
    assert task.loss(model, batch).item() == pytest.approx(outputs.loss.item(), rel=1e-5)
    metrics = task.metrics(model, batch)
    assert metrics["loss"][0].item() / 3 == pytest.approx(outputs.loss.item(), rel=1e-5)
    errors = (outputs.logits[:, 0] - batch["labels"]).abs().sum()
    assert metrics["absolute_error"][0].item() == pytest.approx(errors.item(), rel=1e-5)


def with_config(bert: str, into: Path, **changes: object) -> str:
    into.mkdir()
    for file in Path(bert).iterdir():
        (into / file.name).write_bytes(file.read_bytes())
    config = json.loads((into / "config.json").read_text()) | changes
    (into / "config.json").write_text(json.dumps(config))
    return str(into)


def test_a_model_of_a_regression_needs_no_setting(bert: str, tmp_path: Path) -> None:
    model = with_config(bert, tmp_path / "m", id2label={"0": "LABEL_0"}, label2id={"LABEL_0": 0})
    task = task_of(model, train=write(tmp_path / "a.jsonl", TABLE), label="score")
    assert task.dataset("train")[1]["labels"] == -1.0
    made: Any = task.model()
    assert made.config.problem_type == "regression"


def test_several_files_are_one_split(bert: str, tmp_path: Path) -> None:
    paths = [write(tmp_path / name, TABLE) for name in ("a.parquet", "b.jsonl", "b.csv")]
    assert len(task_of(bert, train=[paths[0], f"{tmp_path}/b.*"]).dataset("train")) == 9
    with pytest.raises(ConfigError, match=r"task\.train: '.*/c\*' matches no file"):
        task_of(bert, train=f"{tmp_path}/c*")
    with pytest.raises(ConfigError, match=r"nor a directory of datasets\.save_to_disk"):
        task_of(bert, train=str(tmp_path))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"label": "score"}, r"a\.jsonl, line 1: 0\.5 is not a class\. Set task\.problem: regression"),
        ({"label": "b", "problem": "regression"}, r"line 1: 'a lift' is not a finite number"),
        ({"text_pair": "c"}, r"line 1: has no column 'c'.*set task\.text_pair"),
        ({"problem": "regression", "num_labels": 3}, r"task\.num_labels: is 3, but regression"),
        ({"problem": "ranking"}, "problem.*'ranking'"),
    ],
)
def test_invalid_input_raises(bert: str, tmp_path: Path, options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        task_of(bert, train=write(tmp_path / "a.jsonl", TABLE), **options)


def test_numbers_in_text_are_not_classes(bert: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"a\.csv, line 2: '0\.5' is not a class"):
        task_of(bert, train=write(tmp_path / "a.csv", TABLE), label="score")
    whole = write(tmp_path / "b.jsonl", TABLE | {"class": [1.0, 0.0, 1.0]})
    assert task_of(bert, train=whole).dataset("train")[0]["labels"] == 1


def test_models_of_several_labels_are_refused(bert: str, tmp_path: Path) -> None:
    model = with_config(bert, tmp_path / "m", problem_type="multi_label_classification")
    with pytest.raises(ConfigError, match="multi_label_classification, which this task does not support"):
        task_of(model, train=write(tmp_path / "a.jsonl", TABLE))


def test_other_names_than_those_of_the_model_are_reported(bert: str, tmp_path: Path) -> None:
    names = {"up": 0, "down": 1}
    model = with_config(bert, tmp_path / "m", label2id=names, id2label={"0": "up", "1": "down"})
    path = write(tmp_path / "a.jsonl", TABLE | {"class": ["up", "Down", "up"]})
    with pytest.warns(TwaWarning, match=r"numbered in sorted order, .*other names: 'up', 'down', but not 'Down'"):
        task = task_of(model, train=path)
    assert [task.dataset("train")[i]["labels"].item() for i in range(3)] == [1, 0, 1]


def test_a_label_that_the_head_of_the_model_lacks_is_named(bert: str, tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", TABLE | {"class": [1, 7, 0]})
    with pytest.raises(ConfigError, match=r"a\.csv, line 3: label 7, but the head of .* has 2 outputs"):
        task_of(bert, train=path)
    model: Any = task_of(bert, train=path, num_labels=8).model()
    assert model.classifier.out_features == 8


@pytest.mark.parametrize(
    ("kind", "longest"),
    [("bert", 20), ("roberta", 19), ("gpt2", 20), ("bart", 20), ("opt", 20), ("openai-gpt", 20), ("deberta-v2", 1000)],
)
def test_a_length_that_the_model_does_not_allow_is_refused(bert: str, tmp_path: Path, kind: str, longest: int) -> None:
    """RoBERTa does not use its positions up to that of padding, BART has two more, DeBERTa has only relative ones."""
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    of_bart = {f"{half}_{key}": 1 for half in ("encoder", "decoder") for key in ("layers", "attention_heads")}
    sizes |= of_bart if kind == "bart" else {}
    vocabulary = {"vocab_size": 30, "max_position_embeddings": 20, "pad_token_id": 0, "eos_token_id": 5}
    relative = {"relative_attention": True, "position_biased_input": False} if kind == "deberta-v2" else {}
    model = shutil.copytree(bert, tmp_path / "model")
    AutoConfig.for_model(kind, **sizes, **vocabulary, **relative).save_pretrained(model)
    path = write(tmp_path / "a.csv", TABLE)
    task = task_of(str(model), train=path, max_length=longest)
    text = {name: torch.full((1, longest), value) for name, value in (("input_ids", 5), ("attention_mask", 1))}
    with torch.no_grad():
        task.model()(**text)
    if kind != "deberta-v2":
        with pytest.raises(ConfigError, match=f"longer than the model allows. Use at most {longest}"):
            task_of(str(model), train=path, max_length=longest + 1)
        assert len(task_of(str(model), train=path, max_length=None).dataset("train")[0]["input_ids"]) == longest
