"""Untrusted files: only regular ones are opened, with bounds on time and memory."""

import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from twa_scale.base.inputs import MAX_DEPTH, brief, integers, open_regular, parse_json, read_bounded
from twa_scale.candidates import open_candidates
from twa_scale.config import load_config
from twa_scale.errors import CandidateError, ConfigError, TwaError
from twa_scale.run.tasks.data_files import Fractions, SplitFiles, split_files

N = 100_000


def make_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(str(path))


def make_link_to_device(path: Path) -> None:
    path.symlink_to("/dev/zero")


MAKERS: list[Callable[[Path], None]] = [os.mkfifo, os.mkdir, make_socket, make_link_to_device]


@pytest.fixture
def working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)  # a socket's path must be short
    return tmp_path


# Opening any of these would block, or reading would not end.


@pytest.mark.parametrize("make", MAKERS)
def test_only_regular_files_are_opened(working_directory: Path, make: Callable[[Path], None]) -> None:
    make(Path("x"))
    for reads in (lambda: open_regular("x"), lambda: read_bounded("x", 100)):
        with pytest.raises(CandidateError, match=r"^x: cannot be read: it is a.*, not a regular file"):
            reads()


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("name", ["x.safetensors", "x.pt", "x.bin", "model.safetensors.index.json"])
def test_candidates_are_regular_files(working_directory: Path, name: str, make: Callable[[Path], None]) -> None:
    if make is os.mkdir:
        pytest.skip("a directory is searched for weights")
    make(Path(name))
    with pytest.raises(CandidateError, match=f"^{name}: cannot be read: it is a"):
        open_candidates([name], minimum=1)


@pytest.mark.parametrize("make", MAKERS)
def test_configuration_is_a_regular_file(working_directory: Path, make: Callable[[Path], None]) -> None:
    make(Path("x.yaml"))
    with pytest.raises(ConfigError, match=r"^x\.yaml: cannot be read: it is a"):
        load_config("x.yaml")


def test_data_files_are_regular(working_directory: Path) -> None:
    Path("data").mkdir()
    Path("data/a.txt").write_text("text")
    os.mkfifo("data/b.txt")
    actual = split_files(SplitFiles(all=["data"]), Fractions(), 0, (".txt",), "task.text")
    assert [path for paths in actual.values() for path in paths] == [Path("data/a.txt")]


def test_path_with_a_zero_byte() -> None:
    with pytest.raises(CandidateError, match=r"null (byte|character)"):
        open_regular("a\0b")


def test_file_larger_than_its_limit(working_directory: Path) -> None:
    Path("x").write_bytes(b"12345")
    assert read_bounded("x", 5) == b"12345"
    with pytest.raises(ConfigError, match=r"^x: is larger than 4 bytes"):
        read_bounded("x", 4, ConfigError)
    with pytest.raises(CandidateError, match=r"^y: cannot be read: No such file"):
        read_bounded("y", 4)


# JSON


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"[" * N + b"]" * N, "nested more than"),
        (b'{"a":' * N, "nested more than"),
        (b"]" * N, "do not match"),
        (b"[" + b"1," * 10_000_001 + b"1]", "more than 10000000 values"),
        (b'"' + b'\\"' * N, "Unterminated"),  # quadratic time for a pattern that searches for the end of each quote
        (b'{"a": 1, "a": 2}', "key 'a' is given twice"),
        (b'{"\\ud800": 1}', "surrogates not allowed"),
        (b"\xff", "can't decode"),
        ("{}".encode("utf-16"), "can't decode"),
        (b"1" * N, "digits"),
    ],
)
def test_invalid_json(raw: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_json(raw)


def test_valid_json() -> None:
    assert parse_json(b"[" * MAX_DEPTH + b"]" * MAX_DEPTH)
    text = {"a": ["[[[", '"]"', "\\", {"\ud83d\ude00": None}]}
    assert parse_json(b'{"a": ["[[[", "\\"]\\"", "\\\\", {"\\ud83d\\ude00": null}]}') == {
        "a": [*text["a"][:3], {"\U0001f600": None}]
    }
    assert parse_json(b"\xef\xbb\xbf{}") == {}


def test_lists_of_integers_are_validated() -> None:
    assert integers([1, -2]) == (1, -2) == integers((1, -2))
    for value in (3, "12", [True], [1.0], [1 << 63], [[1]], {1: 2}):
        with pytest.raises(ValueError, match="not a list of 64-bit integers"):
            integers(value)


def test_values_in_messages_are_short() -> None:
    nested: list[object] = []
    for _ in range(100_000):
        nested = [nested]
    assert len(brief(nested)) < 50 and len(brief(["x" * N] * N)) < 1000 and len(brief(list(range(N)))) < 100


# Settings


def bomb(levels: int) -> str:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, levels)]
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (bomb(12), "more than 20000 values"),
        ("a: &a [*a]", r"the alias \*a is inside its own value"),
        ("[" * 1000 + "]" * 1000, "nested more than 64 levels"),
        ("- " * N + "a", "nested more than 64 levels"),
        ("? " * N + "a", "nested more than 64 levels"),
        ("{a: " * 1000, "nested more than 64 levels"),
        ("a: " + "1" + ":1" * 6_000, "more than 10000 characters"),
        ("a: 1\na: 2", "key 'a' is given twice"),
        ("a: !!int ''", "not valid YAML"),
        ("a: !!bool maybe", "not valid YAML"),
        ("a: 2001-99-99", "not valid YAML"),
        ("a: !!python/object/apply:os.system [touch ran]", "could not determine a constructor"),
        ("a: \0", "not valid YAML"),
    ],
)
def test_invalid_yaml(working_directory: Path, text: str, message: str) -> None:
    Path("x.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message) as error:
        load_config("x.yaml")
    assert str(error.value).startswith("x.yaml: is not valid YAML: ")


@pytest.mark.parametrize(
    "value", ["[" * 1000, "&a [*a]", "!!int ''", "{a: &a [x,x,x,x], b: &b [*a,*a,*a], c: [*b" + ",*b" * 2000 + "]}"]
)
def test_invalid_overrides(working_directory: Path, value: str) -> None:
    Path("x.yaml").write_text("{}")
    with pytest.raises(ConfigError, match=r"^override .seed=.*not valid YAML"):
        load_config("x.yaml", [f"seed={value}"])


def test_override_with_too_many_levels(working_directory: Path) -> None:
    Path("x.yaml").write_text("{}")
    with pytest.raises(ConfigError, match=r"^override 'deepspeed\.a"):
        load_config("x.yaml", ["deepspeed." + "a." * 30_000 + "a=1"])


def test_configuration_has_bounds(working_directory: Path) -> None:
    Path("x.json").write_text("[" * N + "]" * N)
    with pytest.raises(ConfigError, match=r"^x\.json: is not valid JSON: it is nested more than"):
        load_config("x.json")
    Path("x.json").write_text(" " * 300_000)
    with pytest.raises(ConfigError, match=r"^x\.json: is larger than 262144 bytes"):
        load_config("x.json")
    Path("x.yaml").write_bytes(b"a: \xff")
    with pytest.raises(ConfigError, match=r"^x\.yaml: is not valid YAML: .*can't decode"):
        load_config("x.yaml")


def test_anchors_and_merges_of_yaml(working_directory: Path) -> None:
    Path("x.yaml").write_text("a: &a {x: 1}\nb: &b {<<: *a, x: 2}\nc: {<<: *b, x: 3}\n")
    with pytest.raises(ConfigError, match="unknown key 'a'"):  # the file was parsed
        load_config("x.yaml")


# safetensors and indexes


def write_header(path: Path, header: bytes, data: bytes = b"") -> None:
    path.write_bytes(len(header).to_bytes(8, "little") + header + data)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b'{"a":' + b"[" * N + b"]" * N + b"}", "nested more than"),
        (b'{"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},"a":1}', "is given twice"),
        (b'{"a":{"dtype":"U8","shape":[' + b"9223372036854775807," * 100 + b'0],"data_offsets":[0,0]}}', "at most 64"),
        (b'{"a":{"dtype":"U8","shape":[9223372036854775808,0],"data_offsets":[0,0]}}', "64-bit integers"),
        (b'{"a":{"dtype":"U8","shape":[4294967296,4294967296],"data_offsets":[0,0]}}', "needs 18446744073709551616"),
        (b'{"a":{"dtype":"U8","shape":[9],"data_offsets":[9,0]}}', "hold -9"),
        (b'{"a":{"dtype":"U8","shape":[9],"data_offsets":[0,9]}}', "truncated"),
        (b'{"a":{"dtype":[],"shape":[0],"data_offsets":[0,0]}}', "dtype [] is not supported"),
        (b'{"a":{"dtype":"U8","shape":true,"data_offsets":[0,0]}}', "must give its dtype"),
        (b'{"__metadata__":[1],"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}', "__metadata__ is a list"),
        (b'{"a\\ud800":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}', "surrogates"),
    ],
)
def test_invalid_headers(working_directory: Path, header: bytes, message: str) -> None:
    write_header(Path("x.safetensors"), header)
    with pytest.raises(CandidateError) as error:
        open_candidates(["x.safetensors"], minimum=1)
    assert (
        str(error.value).startswith("x.safetensors: ") and message in str(error.value) and len(str(error.value)) < 1000
    )


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ('{"w": "model.safetensors.index.json"}', "is an index"),
        ('{"w": "other.index.json"}', "is an index"),
        ('{"w": "a\\u0000b"}', "not there"),
        ('{"w": "."}', "in the directory of the index"),
        ('{"w": ["x"]}', "in the directory of the index"),
        ('{"w": "pipe.safetensors"}', "not there"),
    ],
)
def test_invalid_indexes(working_directory: Path, weight_map: str, message: str) -> None:
    Path("other.index.json").write_text('{"weight_map": {"w": "model.safetensors.index.json"}}')
    os.mkfifo("pipe.safetensors")
    Path("model.safetensors.index.json").write_text(f'{{"weight_map": {weight_map}}}')
    with pytest.raises(TwaError) as error:
        open_candidates(["model.safetensors.index.json"], minimum=1)
    assert str(error.value).startswith("model.safetensors.index.json: ") and message in str(error.value)


def test_link_to_a_regular_file(working_directory: Path) -> None:
    """The caches of Hugging Face contain links."""
    save_file({"w": torch.ones(2)}, "blob")
    Path("model.safetensors").symlink_to("blob")
    (candidate,) = open_candidates(["model.safetensors"], minimum=1)
    assert candidate.names() == ["w"]
