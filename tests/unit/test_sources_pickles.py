"""Pickles are read as Python reads them, but cannot run code, fill memory, or run without end."""

import contextlib
import itertools
import pickle
import struct
import time
import zipfile
import zlib
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.slices import opened, read, refused
from twa_scale.candidates.formats.crc import PiecewiseCrc
from twa_scale.candidates.formats.pickle_stubs import PickleStub
from twa_scale.candidates.formats.pickles import SafeUnpickler
from twa_scale.errors import CandidateError

SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary()
KEYS = st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.text() | st.binary()
PLAIN = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner)
        | st.dictionaries(KEYS, inner)
        | st.tuples(inner)
        | st.tuples(inner, inner, inner)
        | st.lists(inner, min_size=4).map(tuple)
    ),
    max_leaves=20,
)


@given(PLAIN, st.integers(3, 5))
def test_plain_data_equal_the_pickled_ones(value: object, protocol: int) -> None:
    assert repr(SafeUnpickler(pickle.dumps(value, protocol)).load()) == repr(value)


def test_sets_equal_the_pickled_ones() -> None:
    for protocol in range(2, 6):
        assert SafeUnpickler(pickle.dumps([{1, "a"}, OrderedDict(x={2})], protocol)).load() == [{1, "a"}, {"x": {2}}]


@given(st.data())
def test_damage_never_raises_anything_else(data: st.DataObject) -> None:
    value = OrderedDict(a=[1, 2.5, "x"], b=torch.Size([3, 4]), c={"d": (torch.float32, {1}), 2: b"y" * 300})
    raw = bytearray(pickle.dumps(value, data.draw(st.integers(2, 5))))
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(ValueError):
        SafeUnpickler(raw[: data.draw(st.integers(0, len(raw)))]).load()


class Own:
    def __init__(self) -> None:
        self.x = 3

    def __reduce__(self) -> Any:
        return exec, ("raise SystemExit('it ran')",), {"x": 3}


def test_objects_of_unknown_classes_are_opaque() -> None:
    unpickler = SafeUnpickler(pickle.dumps([Own(), Path("x")]))
    own, path = unpickler.load()
    assert isinstance(own, PickleStub) and own.kind == "builtins.exec" and own.x == 3 and own.y is None
    assert isinstance(path, PickleStub) and unpickler.unresolved == [
        "builtins.exec",
        f"{type(Path()).__module__}.PosixPath",
    ]


HOSTILE = {
    "the length of a text": b"\x80\x04X\xff\xff\xff\xff.",
    "the length of a text of 8 bytes": b"\x80\x04\x8d" + b"\xff" * 8 + b".",
    "the length of bytes": b"\x80\x04\x8e" + b"\xff" * 7 + b"\x00.",
    "an integer": b"\x80\x04\x8b" + struct.pack("<i", 100_000) + b"\x01" * 100_000 + b".",
    "an integer of negative length": b"\x80\x04\x8b\xff\xff\xff\xff.",
    "an unknown instruction": b"\x80\x04\xff.",
    "protocol 0": b"I1\n.",
    "an extension": b"\x80\x04\x82\x01.",
    "nothing on the stack": b"\x80\x04.",
    "no mark": b"\x80\x04]e.",
    "a mark as a value": b"\x80\x04((u.",
    "a call of a text": b"\x80\x04X\x01\x00\x00\x00a)R.",
    "a name without end": b"\x80\x04c" + b"a" * 5000,
    "arguments of a storage": b"\x80\x04)Q.",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_malicious_pickles_are_refused(name: str) -> None:
    with pytest.raises(ValueError):
        SafeUnpickler(HOSTILE[name], lambda *args: args).load()


def test_large_memo_index_allocates_little_memory() -> None:
    """Python's own unpickler allocates 68 GB for this index."""
    assert SafeUnpickler(b"\x80\x02]r\xff\xff\xff\xff0j\xff\xff\xff\xff.").load() == []


def test_keys_are_not_hashed_without_bound() -> None:
    began = time.monotonic()
    value: Any = ()
    for _ in range(60):
        value = (value, value)
    raw = pickle.dumps([value])  # each level is shared
    actual = SafeUnpickler(raw.replace(b"]", b"}", 1).replace(b"a.", b"Ns.", 1)).load()
    assert actual == {} and time.monotonic() - began < 5


def test_deep_pickles_are_read() -> None:
    n = 200_000
    nested = SafeUnpickler(b"\x80\x02" + b"]" * n + b"a" * (n - 1) + b".").load()
    tuples = SafeUnpickler(b"\x80\x02)" + b"\x85" * n + b".").load()
    assert len(nested) == len(tuples) == 1
    with pytest.raises(ValueError, match="not a list of 64-bit integers"):
        SafeUnpickler(b"\x80\x02ctorch\nSize\n)" + b"\x85" * n + b"R.").load()


# Archives


def saved(path: Path, **tensors: torch.Tensor) -> Path:
    torch.save(tensors, path)
    return path


def rewritten(path: Path, out: Path, **options: Any) -> Path:
    """Write the members of an archive again with Python's zipfile."""
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(out, "w", **options) as target:
        for info in source.infolist():
            target.writestr(info.filename, source.read(info))
    return out


def test_an_archive_of_another_writer_is_read(tmp_path: Path) -> None:
    path = rewritten(saved(tmp_path / "a.pt", w=torch.arange(6.0)), tmp_path / "b.pt")
    assert torch.equal(read(opened(path), "w", 0, 6), torch.arange(6.0))


def test_sizes_of_64_bits_are_read(tmp_path: Path) -> None:
    saved(tmp_path / "a.pt", w=torch.arange(6.0))
    with zipfile.ZipFile(tmp_path / "a.pt") as source, zipfile.ZipFile(tmp_path / "b.pt", "w") as target:
        for info in source.infolist():
            with target.open(zipfile.ZipInfo(info.filename), "w", force_zip64=True) as member:
                member.write(source.read(info))
    assert torch.equal(read(opened(tmp_path / "b.pt"), "w", 0, 6), torch.arange(6.0))


def test_an_archive_without_checksums_is_read(tmp_path: Path) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        path = saved(tmp_path / "a.pt", w=torch.arange(6.0))
    finally:
        torch.serialization.set_crc32_options(True)
    assert torch.equal(read(opened(path), "w", 0, 6), torch.arange(6.0))


def test_a_compressed_archive_is_refused(tmp_path: Path) -> None:
    """A small archive may have members of any size."""
    path = rewritten(
        saved(tmp_path / "a.pt", w=torch.zeros(1 << 20)), tmp_path / "b.pt", compression=zipfile.ZIP_DEFLATED
    )
    assert refused(path).startswith(f"{path}: is not an archive of torch.save: its member b'a/")
    assert "compressed" in refused(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda raw: raw + b"x", "bytes after the end"),
        (lambda raw: raw[:-30], "no end: it is truncated"),
        (lambda raw: raw.replace(b"PK\x01\x02", b"PK\x01\x03", 1), "directory is damaged"),
        (lambda raw: raw.replace(b"PK\x06\x06", b"PK\x06\x05", 1), "the end of its directory is damaged"),
        (lambda raw: raw.replace(b"PK\x03\x04", b"PK\x03\x05"), "Git|zip archive"),
        (lambda raw: raw[:4] + raw[4:].replace(b"PK\x03\x04", b"PK\x03\x05"), "the header of member"),
        (lambda raw: raw.replace(b"a/data.pkl", b"a/data.pkx"), "has no member 'data.pkl'"),
        (lambda raw: raw.replace(b"torch._utils", b"torch._utilz"), "CRC"),
    ],
)
def test_archives_that_are_damaged(tmp_path: Path, change: Any, message: str) -> None:
    raw = saved(tmp_path / "a.pt", w=torch.arange(6.0)).read_bytes()
    path = tmp_path / "b.pt"
    path.write_bytes(change(raw))
    try:
        assert torch.equal(read(opened(path), "w", 0, 6), torch.arange(6.0)) and not message
    except CandidateError as error:
        assert str(error).startswith(f"{path}: ")
        assert any(part in str(error) for part in message.split("|")), error


def test_members_that_share_bytes_are_refused(tmp_path: Path) -> None:
    """Overlapping members could have more bytes than the file."""
    raw = bytearray(saved(tmp_path / "a.pt", w=torch.arange(6.0), v=torch.ones(6)).read_bytes())
    entry = raw.rindex(b"PK\x01\x02", 0, raw.index(b"a/data/1", raw.index(b"PK\x01\x02")))
    first = raw.rindex(b"PK\x01\x02", 0, raw.index(b"a/data/0", raw.index(b"PK\x01\x02")))
    raw[entry + 42 : entry + 46] = raw[first + 42 : first + 46]
    (tmp_path / "b.pt").write_bytes(raw)
    assert "overlaps another" in refused(tmp_path / "b.pt")


@pytest.mark.parametrize(
    ("make", "expected_message"),
    [
        (lambda: torch.ones(3).to_sparse(), "_rebuild_sparse_tensor, which is not a dense tensor"),
        (lambda: torch.nested.nested_tensor([torch.ones(2)]), "_rebuild_nested_tensor, which is not a dense tensor"),
        (lambda: torch.ones(3, dtype=torch.complex64).conj(), "saved as a lazy view"),
    ],
)
def test_tensors_without_slices_are_refused(tmp_path: Path, make: Any, expected_message: str) -> None:
    message = refused(saved(tmp_path / "a.pt", w=make()))
    assert message.startswith(f"{tmp_path / 'a.pt'}: ") and expected_message in message


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_protocol_of_torch_save(tmp_path: Path, protocol: int) -> None:
    torch.save(OrderedDict(w=torch.arange(6.0), c=torch.Size([2])), tmp_path / "a.pt", pickle_protocol=protocol)
    assert torch.equal(read(opened(tmp_path / "a.pt"), "w", 0, 6), torch.arange(6.0))


# Checksums


@given(st.data())
def test_the_crc_of_pieces_in_any_order(data: st.DataObject) -> None:
    raw = data.draw(st.binary(min_size=1, max_size=200))
    parts = sorted({0, len(raw), *data.draw(st.lists(st.integers(0, len(raw))))})
    spans = data.draw(st.permutations(list(itertools.pairwise(parts))))
    pieces = PiecewiseCrc()
    sample = data.draw(st.integers(0, len(raw) - 1))  # read before, as in the comparison of ranks
    pieces.add(sample, memoryview(raw[sample : sample + 1]), len(raw) + 1)
    actual = [pieces.add(a, memoryview(raw[a:b]), len(raw)) for a, b in spans]
    assert zlib.crc32(raw) in actual and set(actual) <= {None, zlib.crc32(raw)}


def test_changed_data_is_refused_after_the_last_read(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.pt", w=torch.ones(1000), v=torch.zeros(10))
    raw = bytearray(path.read_bytes())
    raw[raw.index(bytes(torch.ones(1000).numpy())) + 2001] ^= 4
    path.write_bytes(raw)
    candidate = opened(path)
    assert read(candidate, "v", 0, 10).sum() == 0
    read(candidate, "w", 300, 1000)
    with pytest.raises(CandidateError, match=r"a\.pt: tensor 'w' does not have the CRC-32"):
        read(candidate, "w", 0, 300)
    candidate.close()
