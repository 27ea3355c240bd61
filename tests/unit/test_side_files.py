"""Files that are copied from a candidate's directory, and files that are never copied."""

import json
import os
from pathlib import Path

import pytest
import torch

from twa_scale.candidates import side_files as module
from twa_scale.candidates.side_files import side_files, with_dtype

CARRIED = [
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "vocab.txt",
    "spiece.model",
    "tekken.json",
    "qwen.tiktoken",
    "chat_template.jinja",
    "modules.json",
    "config_sentence_transformers.json",
    "adapter_config.json",
    "README.md",
    "1_Pooling/config.json",
    "additional/chat/templates/tool.jinja",
]
LEFT = [
    "model.safetensors",
    "model.safetensors.index.json",
    "model.safetensors.index.fp16.json",
    "pytorch_model.bin",
    "model-00001-of-00002.safetensors",
    "model.onnx",
    "flax_model.msgpack",
    "tf_model.h5",
    "rust_model.ot",
    "model-q4.gguf",
    "optimizer.pt",
    "scheduler.json",
    "rng_state_0.pth",
    "trainer_state.json",
    "training_args.bin",
    "eval_results.json",
    "latest",
    "twa_scale.json",
    "zero_to_fp32.py",
    ".gitattributes",
    ".cache/config.json",
    "onnx/model.onnx",
    "onnx/config.json",
    "checkpoint-500/config.json",
    "checkpoint-500/deeper/model.bin",
    "global_step5/mp_rank_00_model_states.pt",
    "runs/events.out.tfevents.1",
    "a/b/c/d/e/too_deep.json",
]
CODE = ["modeling_x.py", "tools/run.sh"]


def make(directory: Path, *names: str) -> Path:
    for name in names:
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_bytes(b"[]")
    return directory


@pytest.mark.parametrize("code", [False, True])
def test_copied_side_files(tmp_path: Path, code: bool) -> None:
    messages: list[str] = []
    files = side_files(make(tmp_path, *CARRIED, *LEFT, *CODE), code=code, notify=messages.append)
    assert sorted(files) == sorted([*CARRIED, *(CODE if code else [])])
    about_code = [line for line in messages if "carry_code" in line]
    assert len(messages) == 2 - code and len(about_code) == 1 - code
    assert all(name in line for line in about_code for name in CODE)
    assert side_files(None) == {}


def test_only_regular_files_of_the_directory(tmp_path: Path) -> None:
    secret = make(tmp_path, "secret.json") / "secret.json"
    directory = make(tmp_path / "step-2", "config.json", "folder/vocab.json")
    (directory / "vocab.json").symlink_to("folder/vocab.json")
    (directory / "tokenizer.json").symlink_to(secret)
    (directory / "dangling.json").symlink_to("nothing")
    (directory / "up").symlink_to("..")
    (directory / "round").symlink_to(".")
    os.mkfifo(directory / "pipe.json")
    messages: list[str] = []
    latest = tmp_path / "latest"
    latest.symlink_to(directory)
    assert sorted(side_files(latest, notify=messages.append)) == ["config.json", "folder/vocab.json", "vocab.json"]
    for name in ("tokenizer.json", "dangling.json", "up", "round", "pipe.json"):
        assert any(name in line for line in messages), name


def test_the_cache_of_the_hub_links_to_its_blobs(tmp_path: Path) -> None:
    repository = tmp_path / "models--me--mine"
    make(repository, "blobs/0a1b")
    make(tmp_path / "models--other", "blobs/0a1b")
    snapshot = make(repository / "snapshots/12ab", "plain.json")
    (snapshot / "config.json").symlink_to("../../blobs/0a1b")
    (snapshot / "vocab.json").symlink_to("../../../models--other/blobs/0a1b")
    assert sorted(side_files(snapshot, notify=lambda _: None)) == ["config.json", "plain.json"]


def test_side_files_above_the_size_limits_are_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, limit in {"MAX_BYTES": 100, "MAX_TOTAL": 150, "MAX_FILES": 3}.items():
        monkeypatch.setattr(module, name, limit)
    for number, size in enumerate([1, 101, 100, 60, 49, 0]):
        (tmp_path / f"{number}.txt").write_bytes(bytes(size))
    messages: list[str] = []
    assert list(side_files(tmp_path, notify=messages.append)) == ["0.txt", "2.txt", "4.txt"]
    assert len(messages) == 1 and all(f"'{number}.txt'" in messages[0] for number in (1, 3, 5))


def test_modules_with_weights_of_their_own_are_reported(tmp_path: Path) -> None:
    make(tmp_path, "1_Pooling/config.json", "2_Dense/config.json", "2_Dense/model.safetensors", "onnx/model.onnx")
    modules = [{"path": ""}, {"path": "1_Pooling"}, {"path": "2_Dense"}]
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    messages: list[str] = []
    assert sorted(side_files(tmp_path, notify=messages.append)) == ["1_Pooling/config.json", "modules.json"]
    assert len(messages) == 1 and "'2_Dense'" in messages[0] and "not averaged" in messages[0]


def test_converted_type_is_set_in_the_configuration() -> None:
    config = b'{"dtype": "bfloat16", "layers": 2}'
    assert json.loads(with_dtype(config, torch.float32)) == {"dtype": "float32", "layers": 2}
    parts = {"text_config": {"torch_dtype": "float16", "a": {"dtype": "x"}}, "quantization_config": {"dtype": "x"}}
    changed = json.loads(with_dtype(json.dumps(parts | {"torch_dtype": None}).encode(), torch.bfloat16))
    text = {"torch_dtype": "bfloat16", "a": {"dtype": "x"}}
    assert changed == parts | {"text_config": text, "torch_dtype": "bfloat16"}
    for other in (b"{}", b"[1]", b"{", b"[" * 100_000):
        assert with_dtype(other, torch.float32) == other
