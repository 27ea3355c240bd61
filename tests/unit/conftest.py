"""Fixtures of the unit tests."""

import importlib.util
import os
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.forked_modules import run_module
from tests.sentences import SENTENCES
from twa_scale.candidates.formats import file_handles


def num_open() -> int:
    return len(os.listdir("/proc/self/fd"))  # noqa: PTH208


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """Limit this process to 40 more open files, and return the number of files that it has open."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    before = num_open()
    resource.setrlimit(resource.RLIMIT_NOFILE, (before + 40, hard))
    monkeypatch.setattr(file_handles, "_OPEN_FILES", file_handles._OpenFiles())
    monkeypatch.setattr(file_handles._OPEN_FILES, "_limit", 8)
    yield before
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.fixture(scope="session")
def bert(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return a directory with a tiny BERT and a tokenizer."""
    # imported here, because few tests of this directory need them
    from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
    from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

    directory = tmp_path_factory.mktemp("bert")
    tokenizer = Tokenizer(models.WordLevel(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    tokenizer.train_from_iterator(SENTENCES.values(), trainers.WordLevelTrainer(special_tokens=special))
    tokenizer.post_processor = processors.TemplateProcessing(
        "[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1", [("[CLS]", 2), ("[SEP]", 3)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    ).save_pretrained(directory)
    config = BertConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    BertForSequenceClassification(config).save_pretrained(directory)
    return str(directory)


@pytest.fixture(scope="session")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return all checkpoints that real DeepSpeed engines wrote as SIZE/CASE, and their weights as SIZE/CASE.pt."""
    if importlib.util.find_spec("deepspeed") is None:
        pytest.skip("DeepSpeed is not installed")
    directory = tmp_path_factory.mktemp("deepspeed") / "written"
    done = run_module("tests.write_deepspeed", directory, timeout=600)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return directory
