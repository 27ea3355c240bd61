"""Arrays in .json files are read one item at a time, for any block size."""

import gzip
import io
import json
from pathlib import Path

import pytest

from twa_scale.errors import ConfigError
from twa_scale.run.tasks import json_arrays
from twa_scale.run.tasks.tables import rows

ROWS: list[dict[str, object]] = [
    {"a": 1},
    {"a": 'x],[{"', "b": [{"a": 2}, []]},
    {"a": None},
    {"a": {"é": "\\n\n"}},
    {"a": 1e-3},
]


@pytest.mark.parametrize("chunk", [1, 2, 7, 1000])
@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("count", [0, 1, 5])
def test_items_equal_those_of_json_loads(
    monkeypatch: pytest.MonkeyPatch, chunk: int, indent: int | None, count: int
) -> None:
    monkeypatch.setattr(json_arrays, "_CHUNK", chunk)
    text = f" {json.dumps(ROWS[:count], indent=indent)}\n"
    items = json_arrays.array_items(io.StringIO(text[1:]), text[:1])
    assert [json.loads(item) for item in items] == ROWS[:count]


@pytest.mark.parametrize("chunk", [1, 1000])
@pytest.mark.parametrize(
    "text", ['[{"a": 1}', '[{"a": 1} {"a": 2}]', '[{"a": 1},', '[{"a": }]', "[12", '[,{"a": 1}]', "[" * 100_000]
)
def test_damaged_arrays(monkeypatch: pytest.MonkeyPatch, chunk: int, text: str) -> None:
    monkeypatch.setattr(json_arrays, "_CHUNK", chunk)
    with pytest.raises(ValueError):
        list(json_arrays.array_items(io.StringIO(text[1:]), text[:1]))


@pytest.mark.parametrize("name", ["a.json", "a.json.gz"])
def test_arrays_and_lines_in_json_files(tmp_path: Path, name: str) -> None:
    def read(text: str) -> list[tuple[str, list[object]]]:
        (tmp_path / name).write_bytes(gzip.compress(text.encode(), mtime=0) if name.endswith("gz") else text.encode())
        return list(rows(tmp_path / name, {"task.text": "a"}, "task.train"))

    of_array = read(json.dumps(ROWS[:2], indent=1))
    assert of_array == [(f"{tmp_path / name}, item {i + 1}", [ROWS[i]["a"]]) for i in range(2)]
    of_lines = read("".join(json.dumps(row) + "\n" for row in ROWS[:2]))
    assert [values for _, values in of_lines] == [values for _, values in of_array]
    for text, message in {
        '[{"a": 1}, {"a": 2': "item 2: is not JSON",
        "[3]": "item 1: holds int",
        '[{"b": 1}]': "item 1: has no",
    }.items():
        with pytest.raises(ConfigError, match=message):
            read(text)
