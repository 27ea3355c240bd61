"""The data of `causal_lm` in files of other libraries: records, token files, chats, and several sources."""

import gzip
import importlib.util
import json
import tracemalloc
import warnings
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from types import ModuleType
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch import nn
from transformers import PreTrainedTokenizerFast

from twa_scale.base.notices import TwaWarning
from twa_scale.config import TaskConfig
from twa_scale.errors import ConfigError
from twa_scale.run.batches import make_batches
from twa_scale.run.tasks import Batch, Examples, Task, build_task
from twa_scale.run.tasks.mixture import Mixture
from twa_scale.run.tasks.token_records import record_tokens
from twa_scale.run.tasks.tokens import Spool

BYTES = {"byte_gpt": {"n_layer": 1, "n_head": 1, "d_model": 8}}
TEXTS = ["one", "", "zwölf", "three\nlines", "4" * 30]
ROWS = [[1, 2, 3], [], [4], list(range(10, 22)), [5, 6]]
CHAT = [
    {"role": "user", "content": "ab"},
    {"role": "assistant", "content": "cd"},
    {"role": "user", "content": "e"},
    {"role": "assistant", "content": "fgh"},
]
ANSWERS = "{{ m.role[0] }}:{% generation %}{{ m.content }};{% endgeneration %}"
TEMPLATE = (
    "{% for m in messages %}{{ m.role[0] }}:{{ m.content }};{% endfor %}{% if add_generation_prompt %}a:{% endif %}"
)
SYSTEM = "{% if messages[0].role != 'system' %}s:be kind;{% endif %}" + TEMPLATE
THOUGHTS = TEMPLATE.replace("m.content", "('<>' if loop.last and m.role == 'assistant' else '') + m.content")
MARKED = (
    f"{{% for m in messages %}}{{% if m.role == 'assistant' %}}{ANSWERS}{{% else %}}u:{{{{ m.content }}}};{{% endif %}}"
    "{% endfor %}"
)


def causal_lm(**options: object) -> Task:
    return build_task(TaskConfig.model_validate({"name": "causal_lm", "model": BYTES, **options}))


def tokens_of(examples: Examples) -> list[list[int]]:
    return [examples[i]["tokens"].tolist() for i in range(len(examples))]


def predicted_of(examples: Examples) -> list[list[int]]:
    """Return the labels of each example, without ignored ones."""
    return [[label for label in examples[i]["labels"].tolist() if label != -100] for i in range(len(examples))]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """Create a model directory whose tokens are bytes + 1, with this chat template. Token 0 ends a text."""

    def make(template: str | None, begins: bool = False) -> str:
        directory = tmp_path_factory.mktemp("model")
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        tokenizer = Tokenizer(
            models.BPE(vocab={"<e>": 0, **{c: i + 1 for i, c in enumerate(sorted(alphabet))}}, merges=[])
        )
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.decoder = decoders.ByteLevel()
        if begins:
            tokenizer.post_processor = processors.TemplateProcessing(single="<e> $A", special_tokens=[("<e>", 0)])
        fast = PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, bos_token="<e>", eos_token="<e>", chat_template=template
        )
        fast.save_pretrained(directory)
        (directory / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": 257}))
        return str(directory)

    return make


def write_jsonl(path: Path, table: dict[str, list[Any]]) -> Path:
    lines = [json.dumps(dict(zip(table, row, strict=True))) + "\n" for row in zip(*table.values(), strict=True)]
    (gzip.open if path.suffix == ".gz" else open)(path, "wt").write("".join(lines))
    return path


def write_parquet(path: Path, table: dict[str, list[Any]]) -> Path:
    pyarrow.parquet.write_table(pa.table(table), path, row_group_size=2)
    return path


def write_feather(path: Path, table: dict[str, list[Any]]) -> Path:
    pyarrow.feather.write_feather(pa.table(table), path, chunksize=2)
    return path


def save_to_disk(path: Path, table: dict[str, list[Any]]) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        datasets.Dataset.from_dict(table).save_to_disk(path, num_shards=2)
    return path


WRITERS: dict[str, Callable[[Path, dict[str, list[Any]]], Path]] = {
    "data.jsonl": write_jsonl,
    "data.jsonl.gz": write_jsonl,
    "data.parquet": write_parquet,
    "data.arrow": write_feather,
    "saved": save_to_disk,
}


# Records


@pytest.mark.parametrize("name", WRITERS)
def test_texts_in_records(tmp_path: Path, name: str) -> None:
    path = WRITERS[name](tmp_path / name, {"id": list(range(5)), "body": TEXTS})
    options = {"text": {"train": str(path)}, "text_key": "body", "context": 7}
    data = causal_lm(**options).dataset("train")
    whole = "".join(f"{text}\n" for text in TEXTS if text).encode()
    assert b"".join(bytes(tokens) for tokens in tokens_of(data)) == whole[: len(whole) // 8 * 8]


@pytest.mark.parametrize("name", WRITERS)
def test_tokens_in_records(tmp_path: Path, name: str) -> None:
    path = WRITERS[name](tmp_path / name, {"ids": ROWS})
    options = {"tokens": {"train": str(path)}, "tokens_key": "ids", "context": 4}
    flat = [token for row in ROWS for token in row]
    assert tokens_of(causal_lm(**options).dataset("train")) == [flat[i : i + 5] for i in (0, 5, 10)]
    pieces = causal_lm(**options, documents="padded").dataset("train")
    assert predicted_of(pieces) == [[2, 3], [11, 12, 13, 14], [15, 16, 17, 18], [19, 20, 21], [6]]
    assert tokens_of(pieces)[3] == [18, 19, 20, 21, 0]


@pytest.mark.parametrize("type_", ["uint16", "int32", "fixed", "large"])
def test_token_columns_of_every_list_type(tmp_path: Path, type_: str) -> None:
    kind = {"fixed": pa.list_(pa.int64(), 3), "large": pa.large_list(pa.uint8())}.get(type_) or pa.list_(
        getattr(pa, type_)()
    )
    table = pa.table({"input_ids": pa.array([[1, 2, 3], [4, 5, 6], [7, 8, 9]], kind)})
    for name in ("a.arrow", "a.parquet"):
        path = str(tmp_path / name)
        (pyarrow.parquet.write_table if name == "a.parquet" else pyarrow.feather.write_feather)(table.slice(1), path)
        options = {"tokens": {"train": path}, "context": 2, "documents": "packed"}
        data = causal_lm(**options).dataset("train")
        assert tokens_of(data) == [[4, 5, 6], [7, 8, 9]] and predicted_of(data) == [[5, 6], [8, 9]]


@pytest.mark.parametrize("compression", ["uncompressed", "lz4", "zstd"])
def test_compressed_tokens_are_not_kept_in_memory(tmp_path: Path, compression: str) -> None:
    rows = [[i] * 200 for i in range(200)]
    pyarrow.feather.write_feather(pa.table({"input_ids": rows}), tmp_path / "a.arrow", compression, chunksize=50)
    parts = record_tokens(tmp_path / "a.arrow", "input_ids", "task.tokens_key", "task.tokens", 256)
    assert [isinstance(part, Spool) for part in parts] == ([False] * 4 if compression == "uncompressed" else [True])
    assert sum(part.count for part in parts) == 40_000 and parts[-1].read(0, parts[-1].count)[-1] == 199


@pytest.mark.parametrize("name", WRITERS)
def test_masks_and_labels_of_tokenized_records(tmp_path: Path, name: str) -> None:
    table = {
        "input_ids": [[1, 2, 3, 0], [4, 5, 6, 7]],
        "attention_mask": [[1, 1, 1, 0], [1, 1, 1, 1]],
        "labels": [[1, 2, 3, -100], [-100, -100, 6, 7]],
    }
    path = WRITERS[name](tmp_path / name, table)
    options = {"tokens": {"train": str(path)}, "context": 3, "documents": "padded"}
    data = causal_lm(**options).dataset("train")
    assert tokens_of(data) == [[1, 2, 3, 0], [4, 5, 6, 7]]
    assert predicted_of(data) == [[2, 3], [6, 7]]


def test_long_texts_in_csv_files(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(f'text\n"{"a" * 200_000}"\n')
    data = causal_lm(text={"train": str(tmp_path)}, text_key="text", context=99).dataset("train")
    assert len(data) == 2000


def test_splits_of_a_saved_dataset_dict(tmp_path: Path) -> None:
    tables = {"train": ["a" * 9], "test": ["b" * 9], "dev": ["c" * 9], "extra": ["d"]}
    saved = datasets.DatasetDict({name: datasets.Dataset.from_dict({"text": rows}) for name, rows in tables.items()})
    saved.save_to_disk(tmp_path / "all")
    (tmp_path / "all/train/cache-1.arrow").write_bytes(b"what `map` keeps")
    with pytest.warns(TwaWarning, match="'extra' of .*all are not used"):
        task = causal_lm(text=str(tmp_path / "all"), context=8)
    assert [bytes(tokens_of(task.dataset(s))[0]) for s in ("train", "validation", "test")] == [
        b"a" * 9,
        b"c" * 9,
        b"b" * 9,
    ]
    assert len(causal_lm(text={"train": str(tmp_path / "all/train")}, context=8).dataset("train")) == 1
    assert len(causal_lm(text={"train": str(tmp_path / "all/t*")}, context=8).dataset("train")) == 2
    with pytest.raises(ConfigError, match=r"all: is a DatasetDict with the splits 'train'.*such as .*all/train"):
        causal_lm(text={"train": str(tmp_path / "all")})


def test_text_files_are_text_unless_a_key_is_set(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.json", {"text": ["abcdefgh"]})
    plain = causal_lm(text={"train": str(tmp_path)}, context=7).dataset("train")
    assert bytes(tokens_of(plain)[0]) == b'{"text":'
    records = causal_lm(text={"train": str(tmp_path)}, context=7, text_key="text").dataset("train")
    assert bytes(tokens_of(records)[0]) == b"abcdefgh"


def test_texts_are_tokenized_with_their_ends(tmp_path: Path, model: Callable[[str | None], str]) -> None:
    write_jsonl(tmp_path / "a.jsonl", {"text": ["ab", "c"]})
    (tmp_path / "b.txt").write_text("de")
    data = causal_lm(model=model(None), text={"train": str(tmp_path)}, context=7, documents="packed").dataset("train")
    tokens = tokens_of(data)[0]
    assert [i for i, token in enumerate(tokens) if token == 0] == [2, 4, 7]
    assert data[0]["labels"].tolist() == [*tokens[1:3], -100, tokens[4], -100, *tokens[6:]]


def test_texts_begin_with_the_tokens_of_the_tokenizer(tmp_path: Path, model: Callable[..., str]) -> None:
    write_jsonl(tmp_path / "a.jsonl", {"text": ["ab", "c"]})
    options = {"text": {"train": str(tmp_path)}, "context": 3, "documents": "padded"}
    data = causal_lm(model=model(None, begins=True), **options).dataset("train")
    a, b, c = (data[i]["tokens"][j].item() for i, j in ((0, 1), (0, 2), (1, 1)))
    assert tokens_of(data) == [[0, a, b, 0], [0, c, 0, 0]] and predicted_of(data) == [[a, b, 0], [c, 0]]


# Token files


def deepspeed_builder() -> ModuleType:
    """Return the module of DeepSpeed that writes Megatron-LM's format, without importing all of DeepSpeed."""
    package = Path(importlib.util.find_spec("deepspeed").submodule_search_locations[0])  # type: ignore[union-attr,index]
    file = package / "runtime/data_pipeline/data_sampling/indexed_dataset.py"
    spec = importlib.util.spec_from_file_location("indexed_dataset_of_deepspeed", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write_megatron(prefix: Path, dtype: str, code: int | None = None) -> None:
    """Write four documents, one of them empty, and one of two sequences."""
    builder = deepspeed_builder().MMapIndexedDatasetBuilder(f"{prefix}.bin", np.dtype(dtype).type)
    for sequences in ([[1, 2, 3]], [[4, 5], [6]], [], [list(range(10, 16))]):
        for sequence in sequences:
            builder.add_item_numpy(np.array(sequence))
        builder.end_document()
    builder.finalize(f"{prefix}.idx")
    if code is not None:
        raw = bytearray(Path(f"{prefix}.idx").read_bytes())
        raw[17] = code
        Path(f"{prefix}.idx").write_bytes(raw)


@pytest.mark.parametrize(
    ("dtype", "code"),
    [("uint16", 8), *((dtype, None) for dtype in ("uint8", "int16", "int32", "int64", "uint16", "uint32", "uint64"))],
)
def test_files_of_megatron(tmp_path: Path, dtype: str, code: int | None) -> None:
    """Codes of DeepSpeed, and Megatron-LM's code 8 for uint16."""
    write_megatron(tmp_path / "corpus_text_document", dtype, code)
    for inputs in ("corpus_text_document.bin", "corpus_text_document", "", "corpus*"):
        options = {"tokens": {"train": str(tmp_path / inputs)}, "context": 3}
        data = causal_lm(**options).dataset("train")
        assert tokens_of(data) == [[1, 2, 3, 4], [5, 6, 10, 11], [12, 13, 14, 15]]
    packed = causal_lm(**options, documents="packed").dataset("train")
    assert predicted_of(packed) == [[2, 3], [6, 11], [13, 14, 15]]
    padded = causal_lm(**options, documents="padded").dataset("train")
    assert predicted_of(padded) == [[2, 3], [5, 6], [11, 12, 13], [14, 15]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda idx, data: (b"TNTIDX\x00\x00" + idx[8:], data), r"c\.idx: is not an index .* older kind"),
        (lambda idx, data: (idx[:40], data), r"c\.idx: has version 1, dtype code 4 and 40 bytes.*need 122 bytes"),
        (lambda idx, data: (idx[:17] + b"\x0b" + idx[18:], data), "dtype code 11"),
        (lambda idx, data: (idx, data[:-4]), r"c\.idx: has 12 tokens of type int32, but its \.bin file has 44 bytes"),
        (lambda idx, data: (idx[:-8] + bytes(8), data), "boundaries of documents do not fit its 4 sequences"),
        (lambda idx, data: (idx[:50] + b"\x04" + idx[51:], data), "are not consecutive"),
        (
            lambda idx, data: (idx[:34] + np.array([12, -9], "<i4").tobytes() + idx[42:], data),
            "a sequence of -9 tokens",
        ),
    ],
)
def test_damaged_files_of_megatron(
    tmp_path: Path, change: Callable[[bytes, bytes], tuple[bytes, bytes]], message: str
) -> None:
    write_megatron(tmp_path / "c", "int32")
    idx, data = change((tmp_path / "c.idx").read_bytes(), (tmp_path / "c.bin").read_bytes())
    (tmp_path / "c.idx").write_bytes(idx)
    (tmp_path / "c.bin").write_bytes(data)
    with pytest.raises(ConfigError, match=message):
        causal_lm(tokens={"train": str(tmp_path / "c")}, context=3).dataset("train")


def write_llm_c(path: Path, tokens: list[int], magic: int, version: int, dtype: str) -> None:
    header = np.zeros(256, np.int32)
    header[:3] = magic, version, len(tokens)
    path.write_bytes(header.tobytes() + np.array(tokens, dtype).tobytes())


@pytest.mark.parametrize(("magic", "version", "dtype"), [(20240520, 1, "uint16"), (20240801, 7, "uint32")])
def test_files_of_llm_c(tmp_path: Path, magic: int, version: int, dtype: str) -> None:
    tokens = [7, 1, 2, 7, 3, 4, 5, 6]
    write_llm_c(tmp_path / "a.bin", tokens, magic, version, dtype)
    options = {"tokens": {"train": str(tmp_path / "a.bin")}, "context": 3}
    assert tokens_of(causal_lm(**options).dataset("train")) == [tokens[:4], tokens[4:]]
    packed = causal_lm(**options, documents="packed", document_end=7).dataset("train")
    assert predicted_of(packed) == [[2, 7], [4, 5, 6]]  # the tokens after a 7 begin documents
    assert tokens_of(causal_lm(**options, token_dtype="uint8").dataset("train")) == [tokens[:4], tokens[4:]]
    write_llm_c(tmp_path / "a.bin", tokens, magic, 3, dtype)
    with pytest.raises(
        ConfigError, match=rf"a\.bin: begins like a file of llm\.c, version 3 .*Version {version} needs"
    ):
        causal_lm(**options).dataset("train")


def test_documents_of_plain_tokens_need_their_end(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.array([1, 2, 9, 3, 9, 9]))
    options = {"tokens": {"train": str(tmp_path / "a.npy")}, "context": 5}
    for documents in ("packed", "padded"):
        with pytest.raises(
            ConfigError, match=r"the starts of documents in .*a\.npy are not known\. Set task\.document_end"
        ):
            causal_lm(**options, documents=documents).dataset("train")
    data = causal_lm(**options, documents="padded", document_end=9).dataset("train")
    assert predicted_of(data) == [[2, 9], [9]]
    with pytest.raises(ConfigError, match=r"task\.document_end: the token 8 does not occur in .*a\.npy"):
        causal_lm(**options, documents="padded", document_end=8).dataset("train")
    np.save(tmp_path / "a.npy", np.array([1, 2, 9]))
    data = causal_lm(**options, documents="padded", document_end=9).dataset("train")
    assert predicted_of(data) == [[2, 9]]


# Chats


@pytest.mark.parametrize("template", [TEMPLATE, MARKED])
@pytest.mark.parametrize("name", ["chat.jsonl", "saved"])
def test_answers_of_chats_are_predicted(
    tmp_path: Path, model: Callable[[str | None], str], template: str, name: str
) -> None:
    path = {"chat.jsonl": write_jsonl, "saved": save_to_disk}[name](tmp_path / name, {"messages": [CHAT, CHAT[:2]]})
    task = causal_lm(model=model(template), chat={"train": str(path)}, context=30)
    decoder = build_decoder(task)
    assert [decoder(labels) for labels in predicted_of(task.dataset("train"))] == ["cd;fgh;", "cd;"]
    assert decoder(task.dataset("train")[1]["tokens"].tolist()).startswith("u:ab;a:cd;")


@pytest.mark.parametrize("template", [TEMPLATE, SYSTEM, MARKED])
def test_tokens_before_the_first_answer_are_not_predicted(
    tmp_path: Path, model: Callable[[str | None], str], template: str
) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", {"messages": [CHAT[1:]]})
    task = causal_lm(model=model(template), chat={"train": str(path)}, context=40)
    assert [build_decoder(task)(labels) for labels in predicted_of(task.dataset("train"))] == ["cd;fgh;"]


def test_answers_that_change_when_messages_follow_are_not_predicted(
    tmp_path: Path, model: Callable[[str | None], str]
) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", {"messages": [CHAT, CHAT[:2]]})
    task = causal_lm(model=model(THOUGHTS), chat={"train": str(path)}, context=40)
    with pytest.warns(TwaWarning, match=r"task\.chat: 1 answers are not predicted.*Put \{% generation %\}"):
        data = task.dataset("train")
    assert [build_decoder(task)(labels) for labels in predicted_of(data)] == ["<>fgh;", "<>cd;"]


def test_chats_without_a_predicted_token(tmp_path: Path, model: Callable[[str | None], str]) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", {"messages": []})
    task = causal_lm(model=model(TEMPLATE), chat={"train": str(path)}, context=3)
    with pytest.raises(ConfigError, match=r"task\.chat: the files hold no chats"):
        task.dataset("train")
    write_jsonl(path, {"messages": [CHAT]})
    with pytest.raises(ConfigError, match="none of 1 chats has a predicted token in its first 4 tokens"):
        task.dataset("train")


def build_decoder(task: Task) -> Callable[[list[int]], str]:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(task._directory)  # type: ignore[attr-defined]
    return lambda tokens: tokenizer.decode(tokens).replace("<e>", "")


def test_long_chats_are_truncated_and_reported(tmp_path: Path, model: Callable[[str | None], str]) -> None:
    long = [{"role": "user", "content": "x" * 50}, CHAT[1]]
    path = write_jsonl(tmp_path / "a.jsonl", {"messages": [CHAT, long]})
    task = causal_lm(model=model(TEMPLATE), chat={"train": str(path)}, context=12)
    with pytest.warns(
        TwaWarning, match="2 of 2 chats are longer than the context and are truncated; 1 of them are left"
    ):
        data = task.dataset("train")
    assert [build_decoder(task)(labels) for labels in predicted_of(data)] == ["cd;"]
    packed = causal_lm(model=model(TEMPLATE), chat={"train": str(path)}, context=12, documents="packed").dataset(
        "train"
    )
    assert sum(len(labels) for labels in predicted_of(packed)) >= 7


@pytest.mark.parametrize(
    ("template", "messages", "message"),
    [
        (None, CHAT, "has no chat template"),
        (TEMPLATE, CHAT[:1], r"a\.jsonl, line 1: no message has the role `assistant`"),
        (TEMPLATE, "hello", "'hello' is not a list of messages"),
        (TEMPLATE, [{"from": "gpt", "value": "x"}], r"message 1 has the keys 'from', 'value'.*rename `from` to `role`"),
        (TEMPLATE.replace("m.content", "m.nothing.at_all"), CHAT, "line 1: the chat template cannot render the chat"),
        ("{{ messages | length }}" + TEMPLATE, CHAT, "line 1: the tokens of message 2 cannot be found"),
        (MARKED.replace("assistant", "bot"), CHAT, "marks no token as an answer"),
    ],
)
def test_chats_that_cannot_be_used(
    tmp_path: Path, model: Callable[[str | None], str], template: str | None, messages: object, message: str
) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", {"messages": [messages]})
    with pytest.raises(ConfigError, match=message):
        causal_lm(model=model(template), chat={"train": str(path)}).dataset("train")


# Loss


def test_variables_of_the_chat_template(tmp_path: Path, model: Callable[[str | None], str]) -> None:
    path = write_jsonl(tmp_path / "chat.jsonl", {"messages": [CHAT[:2]]})
    options = {"model": model("{% if not think %}!{% endif %}" + TEMPLATE), "chat": {"train": str(path)}, "context": 20}
    for variables, begins in (({}, "!u:ab;"), ({"think": True}, "u:ab;")):
        task = causal_lm(**options, chat_template_kwargs=variables)
        assert build_decoder(task)(tokens_of(task.dataset("train"))[0]).startswith(begins)
    for name, message in (
        ("thinks", r"does not use 'thinks'; did you mean 'think'"),
        ("tokenize", "is set by the task"),
    ):
        with pytest.raises(ConfigError, match=rf"task\.chat_template_kwargs: .*{message}"):
            causal_lm(**options, chat_template_kwargs={name: True}).dataset("train")


SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 48, "use_cache": False}


@pytest.fixture
def packed(tmp_path: Path) -> Callable[..., Task]:
    """Create a task with documents of 1 to 12 tokens in windows of 12, for a small model of this kind."""

    def make(**config: Any) -> Task:
        (tmp_path / "config.json").write_text(json.dumps({**SIZES, **config}))
        path = write_parquet(tmp_path / "train.parquet", {"input_ids": [[1, 2, 3, 4, 5], [6], [7, 8, 9], ROWS[3]]})
        options: dict[str, Any] = {"tokens": {"train": str(path)}, "context": 11, "documents": "packed"}
        return causal_lm(model=str(tmp_path), isolate_documents=True, **options)

    return make


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_isolated_documents_have_the_same_loss_as_alone(packed: Callable[..., Task], attention: str) -> None:
    task = packed(model_type="llama", intermediate_size=32)
    batch = {key: value[None] for key, value in task.dataset("train")[0].items()}
    assert batch["positions"].tolist() == [[0, 1, 2, 3, 4, 0, 0, 1, 2, 0, 1]]
    torch.manual_seed(0)
    net: Any = task.model().train()
    net.set_attn_implementation(attention)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(5.0)  # so that preceding tokens change the result
        actual = task.loss(net, batch)
        losses = [
            torch.nn.functional.cross_entropy(
                net(torch.tensor([ids[:-1]])).logits[0], torch.tensor(ids[1:]), reduction="sum"
            )
            for ids in ([1, 2, 3, 4, 5], [7, 8, 9], [10, 11, 12])
        ]
        joined = task.loss(net, {key: value for key, value in batch.items() if key != "positions"})
    assert net.training and net.model.layers[0].training
    torch.testing.assert_close(actual, sum(losses) / 8)
    assert abs(float(joined - actual)) > 1e-3


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "mamba", "state_size": 4}, "MambaForCausalLM takes no `position_ids`"),
        (
            {"model_type": "jamba", "intermediate_size": 32, "num_key_value_heads": 2, "mamba_d_state": 4}
            | {"mamba_dt_rank": 4, "num_experts": 2},
            "JambaForCausalLM lets tokens attend to the preceding document",
        ),
    ],
)
def test_models_that_do_not_isolate_documents_are_refused(
    packed: Callable[..., Task], config: dict[str, Any], message: str
) -> None:
    task = packed(**config)
    with pytest.raises(ConfigError, match=rf"task\.isolate_documents: {message}.*documents: padded"):
        task.loss(task.model(), {key: value[None] for key, value in task.dataset("train")[0].items()})


def test_loss_is_the_mean_over_predicted_tokens(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", {"input_ids": [[1, 2, 3], [4, 5, 6, 7, 8]]})
    task = causal_lm(tokens={"train": str(path)}, context=4, documents="padded")
    model, data = task.model(), task.dataset("train")
    batch = {key: torch.stack([data[i][key] for i in range(2)]) for key in data[0]}
    losses = [
        nn.functional.cross_entropy(model(t[None, :-1])[0], t[1:], reduction="sum")
        for t in map(torch.tensor, ([1, 2, 3], [4, 5, 6, 7, 8]))
    ]
    assert task.loss(model, batch).item() == pytest.approx(float(sum(losses)) / 6, rel=1e-5)
    total, count = task.metrics(model, batch)["loss"]
    assert count == 6 and total.item() == pytest.approx(float(sum(losses)), rel=1e-5)
    empty = {**batch, "labels": torch.full_like(batch["labels"], -100)}
    assert task.loss(model, empty).item() == 0


# Several sources


def test_sources_have_the_proportions_of_their_weights(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"a" * 8 * 60)
    np.save(tmp_path / "b.npy", np.full(8 * 30, 98))
    write_jsonl(tmp_path / "c.jsonl", {"text": ["c" * 7] * 5})
    sources = [
        {"text": {"train": str(tmp_path / "a.txt")}, "weight": 6},
        {"tokens": {"train": str(tmp_path / "b.npy")}, "weight": 3},
        {"text": {"train": str(tmp_path / "c.jsonl")}},
    ]
    with pytest.warns(TwaWarning, match=r"task\.sources: with these weights an epoch reads its sources 1, 1, 2 times"):
        data = causal_lm(sources=sources, context=7).dataset("train")
    letters = "".join(chr(tokens[0]) for tokens in tokens_of(data))
    assert [letters.count(letter) for letter in "abc"] == [60, 30, 10]
    assert [letters[:50].count(letter) for letter in "abc"] == [30, 15, 5]
    evaluated = make_batches(data, "train", 100, None, 0, 1, 0).in_order()
    once = "".join(chr(row[0]) for batch, _ in evaluated for row in batch["tokens"])
    assert [once.count(letter) for letter in "abc"] == [60, 30, 5] and set(once[:20]) == set("abc")
    all_items = [tokens_of(make_order(data, rank, size)) for size in (1, 2) for rank in range(size)]
    assert all_items[0] == all_items[1] + all_items[2]


def make_order(data: Examples, rank: int, size: int) -> list[Batch]:
    batch = next(make_batches(data, "train", 100, None, rank, size, 3).training(0))
    return [{"tokens": row} for row in batch["tokens"]]


def test_sources_of_one_kind_each_and_labels_for_all(tmp_path: Path) -> None:
    labelled = write_parquet(tmp_path / "a.parquet", {"input_ids": [[1, 2, 3]], "labels": [[-100, -100, 3]]})
    np.save(tmp_path / "b.npy", np.array([4, 5, 6]))
    sources = [{"tokens": {"train": str(path)}} for path in (labelled, tmp_path / "b.npy")]
    assert predicted_of(causal_lm(sources=sources, context=2).dataset("train")) == [[3], [5, 6]]


def test_files_that_splits_of_different_sources_share_are_reported(tmp_path: Path) -> None:
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text("some text")
    (tmp_path / "c.txt").symlink_to(tmp_path / "a.txt")
    sources = [{"text": {"train": str(tmp_path / "[ab].txt")}}, {"text": {"validation": str(tmp_path / "c.txt")}}]
    with pytest.warns(TwaWarning, match=r"task\.sources\[1\]\.text: .*c\.txt' of split 'validation' is .*a\.txt' of"):
        causal_lm(sources=sources)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sources": [{"text": "a", "tokens": "b"}]}, "exactly one of `text`, `tokens` and `chat` in each source"),
        ({"sources": [{"text": "a"}], "text_key": "body"}, "`text_key` has no effect with `sources`"),
        ({"sources": [{"text": "a", "weight": 0}]}, "weight"),
        ({"sources": [{"text": "a"}], "text": "b"}, "exactly one of"),
        ({"sources": [{"text": "stdlib"}, {"chat": "b.jsonl"}]}, r"task\.documents: is not set"),
        ({"chat": "a.jsonl"}, r"a\.jsonl.*matches no file"),
        ({"text": "a.txt", "document_end": 8}, "`document_end` is for `tokens` and has no effect on `text`; remove it"),
        ({"tokens": "a.npy", "isolate_documents": True}, "`isolate_documents` is for `documents: packed`"),
        (
            {"tokens": "a.npy", "documents": "packed", "isolate_documents": True},
            "`isolate_documents` is for a Hugging Face model",
        ),
        ({"tokens": "a.npy", "chat_template_kwargs": {"a": 1}}, "`chat_template_kwargs` is for `chat`"),
        ({"sources": [{"tokens": "a.npy", "messages_key": "m"}]}, "`messages_key` is for `chat` and has no effect on"),
    ],
)
def test_sources_that_cannot_be_used(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        causal_lm(**options)


@pytest.mark.parametrize("sizes", [(1,), (5, 5), (7, 3, 1), (1, 40, 13, 40)])
def test_the_order_of_a_mixture_is_that_of_the_places(sizes: tuple[int, ...]) -> None:
    mixture = Mixture([range(n) for n in sizes], sizes, "task.sources")  # type: ignore[misc]
    positions = [(Fraction(2 * j + 1, 2 * n), i, j) for i, n in enumerate(sizes) for j in range(n)]
    assert [mixture._find(k) for k in range(len(mixture))] == [(i, j) for _, i, j in sorted(positions)]


def test_the_order_of_a_mixture_needs_no_memory() -> None:
    sources: Any = [range(10), range(200_000)]
    tracemalloc.start()
    with pytest.warns(TwaWarning, match="reads its sources"):
        mixture = Mixture(sources, [0.99, 0.01], "task.sources")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(mixture) == 20_000_000 and peak < 1 << 20
    assert [mixture._find(i)[0] for i in range(100)].count(1) == 1


def test_an_epoch_of_too_many_examples_is_refused() -> None:
    first: Any = [{"x": torch.zeros(())}]
    with pytest.raises(ConfigError, match=r"an epoch with these weights has .* examples"):
        Mixture([first, first], [1, 1e-12], "task.sources")


# Records that cannot be used


@pytest.mark.parametrize(
    ("name", "table", "message"),
    [
        ("a.jsonl", {"body": ["x"]}, r"a\.jsonl, line 1: has no column 'text'.*columns are body; set task\.text_key"),
        ("a.jsonl", {"text": ["x", 3]}, r"a\.jsonl, line 2: 3 is not a text"),
        ("a.jsonl", {"text": ["x", None]}, r"a\.jsonl, line 2: has no value in column 'text'"),
        ("a.parquet", {"texts": ["x"]}, r"a\.parquet: has no column 'text'; did you mean 'texts'.*set task\.text_key"),
        ("a.parquet", {"text": ["x", None, "y"]}, r"a\.parquet, row 2: has no value in column 'text'"),
        ("saved", {"text": [1, 2]}, r"\.arrow, row 1: 1 is not a text"),
    ],
)
def test_text_records_that_cannot_be_used(tmp_path: Path, name: str, table: dict[str, list[Any]], message: str) -> None:
    path = {"a.jsonl": write_jsonl, "a.parquet": write_parquet, "saved": save_to_disk}[name](tmp_path / name, table)
    with pytest.raises(ConfigError, match=message):
        causal_lm(text={"train": str(path)}).dataset("train")


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"input_ids": [[1, 2], [3, 256]]}, r"row 2: token 256; the vocabulary of the model is 0 to 255"),
        ({"input_ids": [[1, 2], None]}, r"row 2: has no value in column 'input_ids'"),
        ({"input_ids": [[1, None]]}, r"row 1: has no value in column 'input_ids'"),
        ({"input_ids": ["text"]}, "holds string, not lists of integers. Set task.tokens_key"),
        ({"input_ids": [[0.5]]}, "not lists of integers"),
        (
            {"input_ids": [[1, 2]], "attention_mask": [[1]]},
            "row 1: has 2 tokens and 1 values in column 'attention_mask'",
        ),
        (
            {"input_ids": [[1, 2]], "labels": [[2, -100]]},
            "row 1: the label 2 of position 0 is neither its token 1 nor -100",
        ),
    ],
)
def test_token_records_that_cannot_be_used(tmp_path: Path, table: dict[str, list[Any]], message: str) -> None:
    path = write_parquet(tmp_path / "a.parquet", table)
    with pytest.raises(ConfigError, match=rf"a\.parquet.*{message}"):
        causal_lm(tokens={"train": str(path)}, context=1).dataset("train")


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([{"input_ids": [1, 1 << 70]}], "line 1: .* is not a list of 64-bit integers. Set task.tokens_key to the"),
        ([{"input_ids": [1, 2.0]}], "line 1: .* is not a list of 64-bit integers"),
        ([{"input_ids": [1], "labels": ["a"]}], "line 1: .* is not a list of 64-bit integers. Correct the values of"),
        ([{"input_ids": [1], "labels": [1, 1]}], "line 1: has 1 tokens and 2 values in column 'labels'"),
        ([{"input_ids": [1], "labels": [1]}, {"input_ids": [2]}], "line 2: has the lists 'input_ids', but the first"),
    ],
)
def test_token_records_in_lines_that_cannot_be_used(
    tmp_path: Path, records: list[dict[str, list[Any]]], message: str
) -> None:
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, records)))
    with pytest.raises(ConfigError, match=rf"a\.jsonl, {message}"):
        causal_lm(tokens={"train": str(tmp_path / "a.jsonl")}, context=1).dataset("train")


@pytest.mark.parametrize("suffix", [".arrow", ".parquet"])
def test_texts_that_are_not_utf8(tmp_path: Path, suffix: str) -> None:
    offsets = pa.py_buffer(np.array([0, 3], np.int32))
    table = pa.table({"text": pa.Array.from_buffers(pa.string(), 1, [None, offsets, pa.py_buffer(b"a\xffb")])})
    path = str(tmp_path / f"a{suffix}")
    (pyarrow.parquet.write_table if suffix == ".parquet" else pyarrow.feather.write_feather)(table, path)
    with pytest.raises(ConfigError, match=rf"a{suffix}: cannot be read.*UTF8"):
        causal_lm(text={"train": path}, context=1).dataset("train")


@pytest.mark.parametrize("suffix", [".arrow", ".parquet"])
def test_values_that_python_cannot_express(tmp_path: Path, suffix: str) -> None:
    table = pa.table({"text": pa.array([1 << 50], pa.timestamp("ms"))})
    path = str(tmp_path / f"a{suffix}")
    (pyarrow.parquet.write_table if suffix == ".parquet" else pyarrow.feather.write_feather)(table, path)
    with pytest.raises(ConfigError, match=rf"a{suffix}: cannot be read"):
        causal_lm(text={"train": path}).dataset("train")


@pytest.mark.parametrize(("column", "setting"), [("text", "text"), ("input_ids", "tokens")])
@pytest.mark.parametrize(("at", "offset"), [(8, 4000), (4, -5), (2, 40)])
def test_offsets_outside_the_values(tmp_path: Path, column: str, setting: str, at: int, offset: int) -> None:
    """pyarrow does not check offsets when it reads a file, and would read other memory with these."""
    table = pa.table({column: ["abcd"] * 8 if column == "text" else [[1, 2, 3, 4]] * 8})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    raw = sink.getvalue().to_pybytes()
    offsets = np.arange(0, 36, 4, dtype="<i4")
    assert raw.count(offsets.tobytes()) == 1
    wrong = offsets.copy()
    wrong[at] = offset
    (tmp_path / "a.arrow").write_bytes(raw.replace(offsets.tobytes(), wrong.tobytes()))
    with pytest.raises(ConfigError, match=r"a\.arrow: cannot be read as a \.arrow file: .*[Oo]ffset"):
        causal_lm(**{setting: {"train": str(tmp_path / "a.arrow")}}, context=1).dataset("train")


def test_columns_whose_names_are_not_utf8(tmp_path: Path) -> None:
    path = save_to_disk(tmp_path / "saved", {"text": ["some", "more"]}) / "data-00000-of-00002.arrow"
    path.write_bytes(path.read_bytes().replace(b"text", b"te\xfft"))
    with pytest.raises(ConfigError, match=r"\.arrow: cannot be read.*utf-8"):
        causal_lm(text={"train": str(path)}).dataset("train")


def test_compressed_lines_that_are_damaged_inside(tmp_path: Path) -> None:
    raw = bytearray(gzip.compress(json.dumps({"text": "hello" * 1000}).encode()))
    raw[20] ^= 0xFF
    (tmp_path / "a.jsonl.gz").write_bytes(raw)
    with pytest.raises(ConfigError, match=r"a\.jsonl\.gz cannot be read"):
        causal_lm(text={"train": str(tmp_path)}).dataset("train")


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow", "a.jsonl.gz"])
def test_damaged_records(tmp_path: Path, name: str) -> None:
    path = WRITERS[f"data{name[1:]}"](tmp_path / name, {"text": ["some text"] * 9})
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ConfigError, match=rf"{name}:? cannot be read"):
        causal_lm(text={"train": str(path)}).dataset("train")


def test_pyarrow_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_parquet(tmp_path / "a.parquet", {"text": ["x"]})
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(ConfigError, match=r"pip install twa-scale\[data\]"):
        causal_lm(text={"train": str(tmp_path)}).dataset("train")


def test_temporary_files_leave_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    write_jsonl(tmp_path / "a.jsonl", {"text": ["some text"]})
    options = {"text": {"train": str(tmp_path / "a.jsonl")}, "context": 4}
    with pytest.raises(ConfigError, match=r"tmp: the tokens of the data cannot be kept there.*TMPDIR"):
        causal_lm(**options).dataset("train")
    (tmp_path / "tmp").mkdir()
    data = causal_lm(**options).dataset("train")
    assert not list((tmp_path / "tmp").iterdir()) and bytes(tokens_of(data)[0]) == b"some "
