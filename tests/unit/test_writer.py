"""Outputs: standard readers read them, every rank writes its spans, and publication is atomic."""

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file

from tests.limits import files_up_to, small_disk
from tests.pool import Pool
from twa_scale.base.spans import Span, share, whole_tensor
from twa_scale.candidates import open_candidates
from twa_scale.errors import CandidateError, ConfigError, OutputError
from twa_scale.output import TensorSpec, parse_size, ranks_writer, writing
from twa_scale.output.file_layout import lay_out
from twa_scale.output.provenance import provenance, with_provenance
from twa_scale.ranks import Group

Tensors = dict[str, torch.Tensor]
ORIGIN = provenance("a test", [])


def tensors() -> Tensors:
    generator = torch.Generator().manual_seed(0)
    return {
        "odd": torch.randn(7, generator=generator).bfloat16(),  # the next tensor is unaligned unless tensors are sorted
        "weight": torch.randn(5, 3, generator=generator),
        "scalar": torch.tensor(4),
        "flag": torch.tensor([True, False, True]),
        "wide": torch.randn(2, 2, generator=generator, dtype=torch.float64),
        "half": torch.randn(9, generator=generator).half(),
        "tiny": torch.randn(3, generator=generator).to(torch.float8_e4m3fn),
        "empty": torch.empty(0, 3),
    }


def specs_of(state: Tensors) -> list[TensorSpec]:
    return [TensorSpec(name, tuple(t.shape), t.dtype) for name, t in state.items()]


def write_share(out: Path, group: Group, **options: Any) -> None:
    """Write the spans of this rank."""
    state = tensors()
    with writing(out, specs_of(state), group, **options) as writer:
        for name, tensor in state.items():
            start, stop = share(tensor.numel(), group.rank, group.size)
            writer.write(Span(name, start, stop), tensor.reshape(-1)[start:stop])


def on_ranks(out: Path, **options: Any) -> None:
    write_share(out, Group.world(), **options)


def load(out: Path) -> Tensors:
    actual: Tensors = {}
    for file in out.glob("*.safetensors"):
        actual |= load_file(file)
    return actual


def assert_same(found: Tensors, expected: Tensors) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and found[name].shape == tensor.shape
        assert torch.equal(found[name].view(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8))


def left(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("limit", ["5GB", 40])
def test_ranks_write_one_output(ranks: Pool, tmp_path: Path, size: int, limit: str | int) -> None:
    out = tmp_path / "deep/er/out"
    ranks(on_ranks, size, out=out, max_shard_size=limit, files={"note.txt": b"hello"})
    assert_same(load(out), tensors())
    assert (out / "note.txt").read_text() == "hello"
    assert left(out.parent) == ["out"]
    (candidate,) = open_candidates([out], minimum=1)
    assert candidate.names() == sorted(tensors())


def test_single_file(tmp_path: Path) -> None:
    write_share(tmp_path / "out", Group.alone())
    assert left(tmp_path / "out") == ["model.safetensors"]
    with safe_open(tmp_path / "out/model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert (tmp_path / "out/model.safetensors").stat().st_mode & 0o777 == 0o666 & ~_umask()
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o777 & ~_umask()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_index_of_shards(tmp_path: Path) -> None:
    write_share(tmp_path / "out", Group.alone(), max_shard_size="40B")
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    state = tensors()
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in state.values())
    for name, file in index["weight_map"].items():
        assert torch.equal(load_file(tmp_path / "out" / file)[name].float(), state[name].float())
    files = sorted(set(index["weight_map"].values()))
    assert files == [f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))]


@given(st.lists(st.integers(0, 30), max_size=12), st.integers(1, 60))
def test_shards_do_not_exceed_the_size_limit(numels: list[int], limit: int) -> None:
    specs = [TensorSpec(str(i), (numel,), [torch.int8, torch.float32][i % 2]) for i, numel in enumerate(numels)]
    shards = lay_out(specs, limit)
    assert [name for shard in shards for name in sorted(shard.offsets, key=int)] == [spec.name for spec in specs]
    by_name = {spec.name: spec for spec in specs}
    for shard in shards:
        data = sum(by_name[name].nbytes for name in shard.offsets)
        assert shard.nbytes == len(shard.header) + data
        assert data <= limit or len([n for n in shard.offsets if by_name[n].nbytes]) == 1
        assert all(offset % by_name[name].dtype.itemsize == 0 for name, offset in shard.offsets.items())


def test_values_are_converted_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks_writer, "_PIECE_BYTES", 16)
    values = torch.randn(1000, dtype=torch.float64)
    with writing(tmp_path / "out", [TensorSpec("w", (10, 100), torch.bfloat16)], Group.alone()) as writer:
        writer.write(Span("w", 600, len(values)), values[600:])
        writer.write(Span("w", 0, 600), values[:600])
    assert torch.equal(load(tmp_path / "out")["w"].view(-1), values.bfloat16())


def test_from_pretrained(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=20, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16
    )
    model = transformers.BertModel(config)
    model.save_pretrained(tmp_path / "in")
    state = model.state_dict()
    messages = with_provenance(ORIGIN, {"config.json": tmp_path / "in/config.json"})
    for limit in (2000, "1GB"):
        with writing(
            tmp_path / "out", specs_of(state), Group.alone(), max_shard_size=limit, overwrite=True, **messages
        ) as writer:
            for name, tensor in state.items():
                writer.write(whole_tensor(name, tuple(tensor.shape)), tensor.reshape(-1) * 2)
        read = transformers.BertModel.from_pretrained(tmp_path / "out").state_dict()
        assert all(torch.equal(read[name].double(), state[name].double() * 2) for name in state)


# What must not be published


def fail_in_body(out: Path, bad_rank: int, overwrite: bool) -> None:
    group = Group.world()
    state = tensors()
    with writing(out, specs_of(state), group, overwrite=overwrite) as writer:
        for name, tensor in state.items():
            start, stop = share(tensor.numel(), group.rank, group.size)
            writer.write(Span(name, start, stop), tensor.reshape(-1)[start:stop])
        if group.rank == bad_rank:
            raise CandidateError("step-3: is broken")


@pytest.mark.parametrize(("size", "bad_rank"), [(1, 0), (2, 0), (2, 1), (3, 1)])
@pytest.mark.parametrize("overwrite", [False, True])
def test_error_of_one_rank_is_raised_on_all(
    ranks: Pool, tmp_path: Path, size: int, bad_rank: int, overwrite: bool
) -> None:
    if overwrite:
        write_share(tmp_path / "out", Group.alone(), **with_provenance(ORIGIN, {"old": b""}))
    before = left(tmp_path)
    error = ranks.error(fail_in_body, size, out=tmp_path / "out", bad_rank=bad_rank, overwrite=overwrite)
    assert isinstance(error, CandidateError) and str(error) == "step-3: is broken"
    assert left(tmp_path) == before
    if overwrite:
        assert_same(load(tmp_path / "out"), tensors())


def leave_a_hole(out: Path) -> None:
    group = Group.world()
    with writing(out, [TensorSpec("w", (10,), torch.float32)], group) as writer:
        if group.rank == 0:
            writer.write(Span("w", 0, 9), torch.ones(9))


@pytest.mark.parametrize("size", [1, 2])
def test_incomplete_spans_are_never_published(ranks: Pool, tmp_path: Path, size: int) -> None:
    with pytest.raises(AssertionError, match="'w'"):
        ranks(leave_a_hole, size, out=tmp_path / "out")
    assert left(tmp_path) == []


def write_elsewhere(out: Path) -> None:
    """Give rank 1 another directory than rank 0, as on a node that does not mount it."""
    group = Group.world()
    inputs = group.broadcast

    def broadcast(value: Any, source: int = 0) -> Any:
        path = inputs(value, source)
        hidden = isinstance(path, Path) and path.name.startswith(".")
        return path / "unseen" if group.rank == 1 and hidden else path

    group.broadcast = broadcast  # type: ignore[method-assign]
    write_share(out / "out", group)


def test_rank_on_another_file_system(ranks: Pool, tmp_path: Path) -> None:
    error = ranks.error(write_elsewhere, 2, out=tmp_path)
    assert isinstance(error, OutputError) and "not on a shared file system" in str(error)
    assert left(tmp_path) == []


def test_existing_output(ranks: Pool, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    write_share(out, Group.alone(), **with_provenance(ORIGIN, {}))  # an empty directory is replaced
    own = (out / "model.safetensors").read_bytes()
    for overwrite, message in ((False, "not empty"), (True, "'model.safetensors'")):
        (out / "model.safetensors").write_bytes(b"precious")
        error = ranks.error(on_ranks, 2, out=out, overwrite=overwrite)
        assert isinstance(error, OutputError) and message in str(error) and str(out) in str(error)
        assert (out / "model.safetensors").read_bytes() == b"precious"
    (out / "model.safetensors").write_bytes(own)
    ranks(on_ranks, 2, out=out, overwrite=True)
    assert_same(load(out), tensors())
    assert left(tmp_path) == ["out"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda out: out.write_bytes(b""), "is a file"),
        (lambda out: (out.mkdir(), (out / "thesis.tex").touch()), "holds no weights"),
        (lambda out: (out / "logs").mkdir(parents=True), "holds the directory 'logs'"),
    ],
)
def test_overwrite_replaces_only_outputs(tmp_path: Path, make: Callable[[Path], object], message: str) -> None:
    out = tmp_path / "out"
    make(out)
    with pytest.raises(OutputError, match=message):
        write_share(out, Group.alone(), overwrite=True)
    assert left(tmp_path) == ["out"]


def test_name_of_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "earlier.pt").mkdir()
    write_share(tmp_path / "earlier.pt", Group.alone())
    with pytest.raises(OutputError, match=r"merged\.safetensors: \.safetensors is the ending of a file"):
        write_share(tmp_path / "merged.safetensors", Group.alone())
    assert left(tmp_path) == ["earlier.pt"]


def test_unreadable_side_file(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"elsewhere/config\.json"):
        write_share(tmp_path / "a/out", Group.alone(), files={"config.json": tmp_path / "elsewhere/config.json"})
    assert left(tmp_path / "a") == []


# Disks


def test_not_enough_space(tmp_path: Path) -> None:
    specs = [TensorSpec("w", (1 << 50,), torch.float32)]
    with pytest.raises(OutputError, match="GB are free"), writing(tmp_path / "out", specs, Group.alone()):
        pass
    assert left(tmp_path) == []


def test_unwritable_parent(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="Not a directory"):
        write_share(tmp_path / "file/out", Group.alone())
    if os.geteuid() == 0:
        pytest.skip("root may write everywhere")
    tmp_path.chmod(0o500)
    with pytest.raises(OutputError, match="Permission denied"):
        write_share(tmp_path / "out", Group.alone())


def write_limited(out: Path, limit: int) -> None:
    group = Group.world()
    numel = 1 << 20
    with files_up_to(limit), writing(out, [TensorSpec("w", (numel,), torch.float32)], group) as writer:
        start, stop = share(numel, group.rank, group.size)
        writer.write(Span("w", start, stop), torch.ones(stop - start))


@pytest.mark.parametrize("size", [1, 2])
def test_limit_on_file_sizes(ranks: Pool, tmp_path: Path, size: int) -> None:
    error = ranks.error(write_limited, size, out=tmp_path / "out", limit=1 << 16)
    assert isinstance(error, OutputError) and os.strerror(errno.EFBIG) in str(error) and "ulimit -f" in str(error)
    assert left(tmp_path) == []


def fill_while_writing(out: Path) -> None:
    """Fill the disk after the check of free space."""
    group = Group.world()
    numel = 1 << 20
    with writing(out, [TensorSpec("w", (numel,), torch.float32)], group) as writer:
        if group.rank == 0:
            (out.parent / "other").write_bytes(bytes(4 << 20))
        group.gather(None)
        start, stop = share(numel, group.rank, group.size)
        writer.write(Span("w", start, stop), torch.ones(stop - start))


@pytest.mark.parametrize("size", [1, 2])
def test_disk_fills_up(ranks: Pool, tmp_path: Path, size: int) -> None:
    with small_disk(tmp_path / "disk", 6 << 20) as disk:
        error = ranks.error(fill_while_writing, size, out=disk / "out")
        assert isinstance(error, OutputError) and os.strerror(errno.ENOSPC) in str(error) and "out" in str(error)
        assert left(disk) == ["other"]
        with pytest.raises(OutputError, match="mount point"):
            write_share(disk, Group.alone())


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [("5GB", 5 * 10**9), ("5 gb", 5 * 10**9), ("1.5GiB", 3 << 29), ("2Mi", 2 << 20), ("7B", 7), (9, 9), ("10B", 10)],
)
def test_parse_size(text: str | int, nbytes: int) -> None:
    assert parse_size(text) == nbytes


@pytest.mark.parametrize("text", ["", "GB", "0", "-1", "5 apples", "0.1B", "5", "5.0", " 5 "])
def test_invalid_sizes(text: str) -> None:
    with pytest.raises(ConfigError, match="5GB"):
        parse_size(text)
