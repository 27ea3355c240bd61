"""Candidates: slices equal whole reads, and errors name the problem of a file."""

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from tests.slices import read
from twa_scale.candidates import open_candidates
from twa_scale.candidates.formats.flat_slices import copy_flat
from twa_scale.candidates.formats.safetensors import SafetensorsCandidate
from twa_scale.errors import CandidateError
from twa_scale.kernels.torch.checksum import checksum, wrap

Tensors = dict[str, torch.Tensor]
DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
]


def tensors(seed: int = 0) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    made = {str(d).removeprefix("torch."): (torch.randn(3, 5, 7, generator=generator) * 3).to(d) for d in DTYPES}
    return made | {
        "scalar": torch.randn((), generator=generator),
        "empty": torch.empty(0, 4),
        "layers.0.weight": torch.randn(11, 3, generator=generator),
        "layers.1.weight": torch.randn(11, 3, generator=generator),
    }


def save_whole(path: Path, state: Tensors) -> Path:
    path.mkdir(parents=True)
    save_file(state, path / "model.safetensors")
    return path


def save_shards(path: Path, state: Tensors) -> Path:
    path.mkdir(parents=True)
    names = sorted(state)
    weight_map: dict[str, str] = {}
    for i in range(3):
        file = f"model-{i + 1:05d}-of-00003.safetensors"
        save_file({name: state[name] for name in names[i::3]}, path / file)
        weight_map |= dict.fromkeys(names[i::3], file)
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return path


def save_torch(path: Path, state: Tensors) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"model": state, "step": 3}, path.with_suffix(".pt"))
    return path.with_suffix(".pt")


def save_torch_shards(path: Path, state: Tensors) -> Path:
    path.mkdir(parents=True)
    torch.save(state, path / "pytorch_model-00001-of-00001.bin")
    weight_map = dict.fromkeys(state, "pytorch_model-00001-of-00001.bin")
    (path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return path


def keep(path: Path, state: Tensors) -> Tensors:
    return state


SAVERS: list[Callable[[Path, Tensors], Path | Tensors]] = [
    save_whole,
    save_shards,
    save_torch,
    save_torch_shards,
    keep,
]


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)


def refused(spec: object, minimum: int = 2) -> str:
    with pytest.raises(CandidateError) as error:
        open_candidates(spec, minimum=minimum)  # type: ignore[arg-type]
    return str(error.value)


@pytest.mark.parametrize("save", SAVERS)
def test_every_source_reads_the_same_slices(tmp_path: Path, save: Callable[[Path, Tensors], Path | Tensors]) -> None:
    states = [tensors(0), tensors(1)]
    candidates = open_candidates([save(tmp_path / f"step-{i}", s) for i, s in enumerate(states)])  # type: ignore[arg-type]
    for candidate, state in zip(candidates, states, strict=True):
        assert candidate.names() == sorted(state)
        total = 0
        for name, tensor in state.items():
            assert candidate.shape(name) == tuple(tensor.shape)
            assert candidate.dtype(name) == tensor.dtype
            n = tensor.numel()
            for start, stop in [(0, n), (0, 0), (n // 3, n), (n // 3, n // 2)]:
                assert torch.equal(bits(read(candidate, name, start, stop)), bits(tensor.reshape(-1)[start:stop]))
                total += (stop - start) * tensor.itemsize
        assert candidate.bytes_read == total
        candidate.close()


def test_names_are_without_wrappers(tmp_path: Path) -> None:
    state = {
        "module._orig_mod.a._fsdp_wrapped_module.w": torch.ones(2),
        "module.b._checkpoint_wrapped_module.module.w": torch.ones(1),
    }
    save_file(state, tmp_path / "x.safetensors")
    (candidate,) = open_candidates([tmp_path / "x.safetensors"], minimum=1)
    assert candidate.names() == ["a.w", "b.module.w"]
    assert dict(zip(candidate.names(), state, strict=True)) == candidate.stored_names


def test_module_prefix_is_kept_if_a_name_lacks_it(tmp_path: Path) -> None:
    state = {"module.w": torch.zeros(3), "n_averaged": torch.ones(())}
    files = {"module.w": "a.safetensors", "n_averaged": "b.safetensors"}
    for name, file in files.items():  # each file alone would differ
        save_file({name: state[name]}, tmp_path / file)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    for spec in (tmp_path, state, {f"module.{name}": value for name, value in state.items()}):
        (candidate,) = open_candidates([spec], minimum=1)  # type: ignore[arg-type]
        assert candidate.names() == ["module.w", "n_averaged"] and candidate.shape("module.w") == (3,)
        assert torch.equal(read(candidate, "module.w", 1, 3), torch.zeros(2))


def test_directory_of_a_candidate(tmp_path: Path) -> None:
    path = save_whole(tmp_path / "a", tensors())
    save_file(tensors(), tmp_path / "b.safetensors")
    spec = [path, path / "model.safetensors", tmp_path / "b.safetensors"]
    assert [candidate.directory for candidate in open_candidates(spec)] == [path, path, None]


@given(st.data())
def test_slices_of_any_layout(data: st.DataObject) -> None:
    shape = data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=4))
    order = data.draw(st.permutations(range(len(shape))))
    tensor = torch.arange(torch.Size(shape).numel()).view(shape).permute(order)
    if data.draw(st.booleans()):
        tensor = torch.stack([tensor, tensor])[:1].expand(2, *tensor.shape)
    start = data.draw(st.integers(0, tensor.numel()))
    stop = data.draw(st.integers(start, tensor.numel()))
    out = torch.full((stop - start,), -1)
    copy_flat(tensor, start, out)
    assert torch.equal(out, tensor.reshape(-1)[start:stop])


@given(st.data())
def test_checksums_add_up_over_any_split(data: st.DataObject) -> None:
    dtype = data.draw(st.sampled_from(DTYPES))
    values = (torch.randn(data.draw(st.integers(1, 40))) * 100).to(dtype)
    part = data.draw(st.integers(0, len(values)))
    assert checksum(values) == wrap(checksum(values[:part]) + checksum(values[part:]))
    changed = values.clone().view(torch.uint8)
    changed[data.draw(st.integers(0, len(changed) - 1))] ^= 1
    assert checksum(changed.view(dtype)) != checksum(values)


def test_checksums_wrap_around() -> None:
    assert checksum(torch.tensor([2**63 - 1, 1])) == -(2**63) == wrap(2**63)
    assert checksum(torch.tensor([-1.5, 0.0])) == torch.tensor(-1.5).view(torch.int32).item()


# Search for candidates


def test_globs_are_in_natural_order(working_directory: Path) -> None:
    for i in (10, 2, 1):
        save_whole(working_directory / f"run/step-{i}", tensors(i))
    assert [c.label for c in open_candidates("run/step-*")] == ["run/step-1", "run/step-2", "run/step-10"]
    assert [c.label for c in open_candidates(["run/step-10", "run/step-?"])] == [
        "run/step-10",
        "run/step-1",
        "run/step-2",
    ]


def test_unfinished_outputs_are_not_matched(working_directory: Path) -> None:
    for name in ("step-1", "step-2", ".step-3.tmp-0a1b2c3d", "step-4.tmp-0a1b2c3d"):
        save_whole(working_directory / ".cache" / name, tensors())
    assert len(open_candidates(str(working_directory / ".cache/*"))) == 2
    assert len(open_candidates(".cache/**/model.safetensors")) == 2


def test_contents_of_a_directory(working_directory: Path) -> None:
    for name, file in [("a", "adapter.safetensors"), ("b", "pytorch_model.bin")]:
        (working_directory / name).mkdir()
        path = working_directory / name / file
        save_file(tensors(), path) if path.suffix == ".safetensors" else torch.save(tensors(), path)
    assert len(open_candidates(["a", "b"])) == 2
    (working_directory / "c").mkdir()
    message = refused(["a", "c"])
    assert message.startswith("c: ") and "model.safetensors" in message and "'c/*'" in message
    save_file(tensors(), working_directory / "a/second.safetensors")
    assert "2 *.safetensors files without an index" in refused(["a", "b"])


def test_too_few_candidates_raise(working_directory: Path) -> None:
    save_whole(working_directory / "step-1", tensors())
    message = refused("step-*")
    assert "found 1 (step-1)" in message and "at least 2" in message
    assert len(open_candidates("step-*", minimum=1)) == 1
    assert "the list is empty" in refused([])
    message = refused("nowhere/*")
    assert "'nowhere/*'" in message and str(working_directory) in message
    assert "nowhere" in refused(["step-1", "nowhere"])


def test_pattern_matches_other_file(working_directory: Path) -> None:
    save_whole(working_directory / "step-1", tensors())
    (working_directory / "log.txt").write_text("loss 1.0")
    message = refused("*")
    assert "'log.txt'" in message and "'*'" in message and str(working_directory) in message
    assert "not a file of weights" in refused(["step-1", "log.txt"])


# Candidates that differ


@pytest.mark.parametrize(
    ("change", "expected_message"),
    [
        (lambda s: s.pop("layers.1.weight"), ["'layers.1.weight' is missing"]),
        (lambda s: s.update(extra=torch.ones(1)), ["holds tensor 'extra'"]),
        (
            lambda s: s.update({"layers.1.weigth": s.pop("layers.1.weight")}),
            ["'layers.1.weight' is missing", "did you mean 'layers.1.weigth'?"],
        ),
        (lambda s: s.update(scalar=torch.ones(2)), ["'scalar'", "(2,)", "()"]),
        (lambda s: s.update(scalar=torch.ones((), dtype=torch.int64)), ["'scalar' is int64", "floating point"]),
        (lambda s: s.update(int64=s["int64"].float()), ["'int64' is floating point", "have it int64"]),
    ],
)
@pytest.mark.parametrize("odd", [0, 1, 2])
def test_incompatible_candidate_is_named(
    working_directory: Path, change: Callable[[Tensors], None], expected_message: list[str], odd: int
) -> None:
    for i in range(3):
        state = tensors(i)
        if i == odd:
            change(state)
        save_whole(working_directory / f"step-{i}", state)
    message = refused("step-*")
    assert message.startswith(f"step-{odd}") and all(part in message for part in expected_message), message


def test_floating_types_may_differ() -> None:
    first, second = {"w": torch.ones(3)}, {"w": torch.ones(3, dtype=torch.bfloat16)}
    assert [c.dtype("w") for c in open_candidates([first, second])] == [torch.float32, torch.bfloat16]


def test_names_that_are_equal_without_prefixes_are_refused() -> None:
    state = {"w": torch.ones(1), "_orig_mod.w": torch.zeros(1)}
    message = refused([state, state])
    assert "'w'" in message and "'_orig_mod.w'" in message


def test_tensors_that_cannot_be_read() -> None:
    for tensor, message in [
        (torch.ones(2, device="meta"), "meta"),
        (torch.ones(2).to_sparse(), "sparse"),
    ]:
        assert message in refused([{"w": tensor}, {"w": tensor}])
    assert "holds no tensors" in refused([{"epoch": 1}, {"epoch": 2}])


# Damaged files


Damage = Callable[[bytearray], bytes | bytearray]


def damaged(working_directory: Path, damage: Damage) -> str:
    save_whole(working_directory / "step-1", tensors())
    save_whole(working_directory / "step-2", tensors())
    file = working_directory / "step-2/model.safetensors"
    file.write_bytes(damage(bytearray(file.read_bytes())))
    message = refused("step-*")
    assert message.startswith("step-2/model.safetensors: ")
    return message


def header(raw: bytes | bytearray) -> tuple[dict[str, Any], bytes | bytearray]:
    length = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def rewritten(change: Callable[[dict[str, Any]], object]) -> Damage:
    def damage(raw: bytearray) -> bytes:
        entries, data = header(raw)
        change(entries)
        text = json.dumps(entries).encode()
        return len(text).to_bytes(8, "little") + text + data

    return damage


def test_truncated_file_is_refused(working_directory: Path) -> None:
    message = damaged(working_directory, lambda raw: raw[:-3])
    assert "truncated" in message and "tensor" in message


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda raw: raw[:5], "truncated"),
        (lambda raw: b"", "is empty"),
        (lambda raw: raw[:100], "truncated"),
        (lambda raw: b"\xff" * 8 + raw[8:], "not a safetensors file"),
        (lambda raw: raw[:8] + os.urandom(64).replace(b"{", b"x") + raw[72:], "not the JSON"),
        (lambda raw: raw[:8] + b"\xff" + raw[9:], "not the JSON"),
        (lambda raw: (2).to_bytes(8, "little") + b"[]", "not the JSON"),
        (lambda raw: (2).to_bytes(8, "little") + b"{}", "holds no tensors"),
        (lambda raw: raw + b"xx", "2 bytes follow"),
        (lambda raw: b"version https://git-lfs.github.com/spec/v1", "git lfs pull"),
        (lambda raw: b"<!DOCTYPE html><html>404 Not Found</html>", "download has failed"),
        (rewritten(lambda e: e["scalar"].update(dtype="F3")), "'F3' is not supported"),
        (rewritten(lambda e: e["scalar"].update(shape=[2])), "tensor 'scalar'"),
        (rewritten(lambda e: e["scalar"].update(shape=[-1])), "integers from 0 on"),
        (rewritten(lambda e: e["scalar"].pop("dtype")), "must give its dtype"),
        (rewritten(lambda e: e.update(scalar=[])), "must give its dtype"),
        (rewritten(lambda e: e.pop("scalar")), "a gap or an overlap"),
        (rewritten(lambda e: e.update(twin=e["scalar"])), "a gap or an overlap"),
    ],
)
def test_random_bytes(working_directory: Path, damage: Damage, message: str) -> None:
    assert message in damaged(working_directory, damage)


def test_a_file_that_shrinks_while_in_use(working_directory: Path) -> None:
    for save, name in ((save_whole, "step-1/model.safetensors"), (save_torch, "other.pt")):
        path = working_directory / name
        save(path.parent if save is save_whole else path, tensors())
        (candidate,) = open_candidates([path], minimum=1)
        path.write_bytes(path.read_bytes()[:-400])
        with pytest.raises(CandidateError, match=r"cannot be read: (it ends|the file had)"):
            for tensor in candidate.names():
                read(candidate, tensor, 0, torch.Size(candidate.shape(tensor)).numel())


def test_damaged_indexes_are_refused(working_directory: Path) -> None:
    path = save_shards(working_directory / "step-1", tensors())
    save_whole(working_directory / "step-2", tensors())
    assert len(open_candidates("step-*")) == 2
    index = path / "model.safetensors.index.json"
    content = json.loads(index.read_text())

    content["weight_map"]["layers.0.weigth"] = content["weight_map"]["layers.0.weight"]
    index.write_text(json.dumps(content))
    message = refused("step-*")
    assert "'layers.0.weigth' is missing" in message and "did you mean 'layers.0.weight'?" in message

    (path / "model-00002-of-00003.safetensors").unlink()
    assert "'model-00002-of-00003.safetensors', which is not there" in refused("step-*")
    content["weight_map"]["scalar"] = "../step-2/model.safetensors"
    index.write_text(json.dumps(content))
    assert "in the directory of the index" in refused("step-*")
    for text in ("{", "[]", '{"weight_map": []}'):
        index.write_text(text)
        assert "model.safetensors.index.json" in refused("step-*")


def test_files_with_tensors_that_the_index_lacks(working_directory: Path) -> None:
    path = save_shards(working_directory / "step-1", tensors())
    index = path / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    del content["weight_map"]["scalar"]
    index.write_text(json.dumps(content))
    message = refused(["step-1"], 1)
    assert message.startswith("step-1/model-0000")
    assert "'scalar', which model.safetensors.index.json does not name" in message
    save_file({"scalar": torch.ones(())}, path / "extra.safetensors")
    content["weight_map"]["scalar"] = "extra.safetensors"
    index.write_text(json.dumps(content))
    assert "'scalar', which model.safetensors.index.json places in 'extra.safetensors'" in refused(["step-1"], 1)
    index.write_bytes(index.read_text().encode("utf-16"))
    assert "UnicodeDecodeError" in refused(["step-1"], 1) and len(refused(["step-1"], 1)) < 500


def test_a_file_that_is_written_while_in_use(tmp_path: Path) -> None:
    path = save_whole(tmp_path / "a", tensors()) / "model.safetensors"
    (candidate,) = open_candidates([path], minimum=1)
    read(candidate, "float32", 0, 4)
    with path.open("r+b") as file:
        file.seek(-8, os.SEEK_END)
        file.write(bytes(8))
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))  # file systems have a coarse clock
    with pytest.raises(CandidateError, match=r"cannot be read: the file has been written since it was opened"):
        read(candidate, "float32", 0, 4)


# Torch files


class Malicious:
    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, ("touch ran",)


@pytest.mark.parametrize("legacy", [False, True])
def test_a_pickle_that_runs_code(working_directory: Path, legacy: bool) -> None:
    torch.save({"w": torch.ones(2), "x": Malicious()}, "bad.pt", _use_new_zipfile_serialization=not legacy)
    message = refused(["bad.pt", "bad.pt"])
    assert message.startswith("bad.pt: ") and "refused and nothing in it was run" in message
    assert legacy or ".system" in message
    assert not Path("ran").exists()


def test_a_bare_pickle_that_runs_code(working_directory: Path) -> None:
    Path("bad.bin").write_bytes(pickle.dumps({"w": Malicious()}))
    assert "nothing in it was run" in refused(["bad.bin", "bad.bin"])
    assert not Path("ran").exists()


def test_torch_files_that_are_damaged(working_directory: Path) -> None:
    torch.save(tensors(), "whole.pt")
    raw = Path("whole.pt").read_bytes()
    Path("cut.pt").write_bytes(raw[: len(raw) // 2])
    assert "truncated" in refused(["whole.pt", "cut.pt"])
    Path("garbled.pt").write_bytes(raw.replace(b"torch._utils", b"torch._xtils"))
    assert refused(["whole.pt", "garbled.pt"]).startswith("garbled.pt: ")
    torch.save([1], "list.pt")
    assert "holds list, not a dict of tensors" in refused(["whole.pt", "list.pt"])
    torch.save({"epoch": 3}, "none.pt")
    assert "holds no tensors" in refused(["whole.pt", "none.pt"])
    Path("lfs.pt").write_text("version https://git-lfs.github.com/spec/v1\n")
    assert "git lfs pull" in refused(["whole.pt", "lfs.pt"])


@pytest.mark.parametrize("key", ["state_dict", "model", "model_state_dict", "module", None])
def test_keys_of_the_weights_in_torch_files(working_directory: Path, key: str | None) -> None:
    state = {"w": torch.randn(4, 6).t(), "conv": torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)}
    content: dict[str, object] = {key: state, "best": torch.ones(1)} if key else dict(state)
    torch.save(content | {"epoch": 3, "optimizer": {"state": {}}}, "x.pt")
    first, _ = open_candidates(["x.pt", "x.pt"])
    assert first.names() == ["conv", "w"]
    for name, tensor in state.items():
        assert torch.equal(read(first, name, 5, 17), tensor.reshape(-1)[5:17])


def test_an_index_lists_the_names_of_a_file_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not once for each of its tensors, which would take minutes for twenty thousand tensors."""
    listed: list[str] = []
    names = SafetensorsCandidate.names

    def counted(candidate: SafetensorsCandidate) -> Any:
        listed.append(candidate.label)
        return names(candidate)

    monkeypatch.setattr(SafetensorsCandidate, "names", counted)
    open_candidates([save_shards(tmp_path / "x", tensors())], minimum=1)
    assert len(listed) <= 3
