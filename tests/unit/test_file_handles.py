"""Reads of candidate files on systems that lack a call of Linux."""

import os
from pathlib import Path

import pytest

from twa_scale.candidates.formats import file_handles
from twa_scale.candidates.formats.file_handles import File
from twa_scale.errors import CandidateError


def test_without_preadv_the_same_bytes_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = os.urandom(1000)
    path = tmp_path / "file"
    path.write_bytes(content)
    monkeypatch.delattr(os, "preadv")
    monkeypatch.setattr(file_handles, "_MAX_COPIED", 300)
    buffer = bytearray(990)
    file = File(path)
    file.read(memoryview(buffer), 7, "bytes")
    assert buffer == content[7:997]
    with pytest.raises(CandidateError, match="ends at byte 1000, 97 bytes too early"):
        file.read(memoryview(buffer), 107, "bytes")
