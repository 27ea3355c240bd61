"""Files of torch.save are read without torch.load: every layout and type, at any offset, without running code."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from twa_scale.candidates.formats.file_handles import File
from twa_scale.candidates.formats.pickle_stubs import PickleStub
from twa_scale.candidates.formats.stored_tensors import Stored
from twa_scale.candidates.formats.torch_archive import Archive
from twa_scale.errors import CandidateError

GENERATOR = torch.Generator().manual_seed(0)
BASE = torch.randn(6, 5, 4, 3, generator=GENERATOR)
TENSORS = {
    "whole": BASE,
    "rows": BASE[2:4],
    "columns": BASE[:, 1:3],
    "transposed": BASE.transpose(0, 2),
    "channels_last": BASE.to(memory_format=torch.channels_last),
    "expanded": torch.randn(3, 1, generator=GENERATOR).expand(3, 5),
    "parameter": torch.nn.Parameter(BASE[0]),
    "scalar": torch.tensor(3.5),
    "empty": torch.empty(0, 3),
    **{
        str(dtype).removeprefix("torch."): torch.arange(13).to(dtype)
        for dtype in (torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool, torch.uint16)
    },
}


class Malicious:
    def __reduce__(self) -> tuple[Callable[[str], Any], tuple[str]]:
        return exec, ("raise SystemExit('it ran')",)


def saved(content: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


@pytest.mark.parametrize("before", [b"", b"x" * 1001])
def test_slices_of_every_layout(tmp_path: Path, before: bytes) -> None:
    """Also in the middle of a file, at an offset that is not aligned for any type."""
    archive = saved(TENSORS)
    (tmp_path / "x").write_bytes(before + archive + before)
    content = Archive(File(tmp_path / "x"), len(before), len(archive)).content()
    assert content.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        stored, n = content[name], tensor.numel()
        assert (stored.shape, stored.dtype, stored.numel) == (tuple(tensor.shape), tensor.dtype, n)
        for start, stop in [(0, n), (0, 0), (n // 3, n), (n // 3, n // 2)]:
            out = torch.empty(stop - start, dtype=tensor.dtype)
            stored.read(start, out, name)
            assert torch.equal(out, tensor.detach().reshape(-1)[start:stop]), (name, start, stop)


def test_objects_become_stubs(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(saved({"w": torch.ones(2), "bad": [Malicious()], "path": tmp_path}))
    content = Archive(File(tmp_path / "x")).content()
    assert isinstance(content["w"], Stored) and content["bad"][0].kind == "builtins.exec"
    assert isinstance(content["path"], PickleStub)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda raw: raw[:-10], "truncated"),
        (lambda raw: raw[: len(raw) // 2], "truncated"),
        (lambda raw: b"", "truncated"),
        (lambda raw: raw.replace(b"little", b"bigbig"), "big-endian|cannot be parsed|CRC"),
        (lambda raw: raw.replace(b"torch._utils", b"torch._xtils"), "CRC|cannot be parsed"),
    ],
)
def test_damaged_archives_are_refused(tmp_path: Path, damage: Callable[[bytes], bytes], message: str) -> None:
    (tmp_path / "x").write_bytes(damage(saved({"w": torch.ones(2)})))
    with pytest.raises(CandidateError, match=message) as error:
        Archive(File(tmp_path / "x")).content()["w"]
    assert str(error.value).startswith(f"{tmp_path / 'x'}: ")
