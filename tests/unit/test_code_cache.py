"""Kernels compute the same with a damaged or unusable cache of machine code."""

import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numba.core import config

from twa_scale.kernels.numba.loops import compiled

INTEGERS, FLOATS = np.array([1, 2, 3], np.int32), np.ones(3, np.float32)


def kernel() -> Any:
    """Return the kernel as another process has it: neither compiled nor loaded."""

    def total(values: Any) -> Any:
        result = 0.0
        for value in values:
            result += value
        return result

    return compiled(total)


def hits(values: Any) -> int:
    """Call the kernel in another process, and return how often it has found machine code."""
    total = kernel()
    assert total(values) == values.sum()
    return sum(total.stats.cache_hits.values())


def test_damaged_files_cost_only_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Damaged files are replaced. If that is impossible, this is reported."""
    monkeypatch.setattr(config, "CACHE_DIR", str(tmp_path))
    caplog.set_level(logging.WARNING)
    assert [hits(INTEGERS), hits(FLOATS), hits(INTEGERS)] == [0, 0, 1]
    (index,) = tmp_path.rglob("*.nbi")
    first, second = sorted(tmp_path.rglob("*.nbc"))

    shutil.copy(second, first)  # two processes have written the same file
    assert [hits(INTEGERS), hits(INTEGERS), hits(FLOATS)] == [0, 1, 1]
    first.write_bytes(first.read_bytes()[:99])
    assert [hits(INTEGERS), hits(INTEGERS)] == [0, 1]
    index.write_bytes(b"")
    assert [hits(FLOATS), hits(FLOATS)] == [0, 1]
    assert not caplog.messages

    index.unlink()
    index.mkdir()  # a file that cannot be read or written, whoever runs the test
    assert [hits(FLOATS), hits(FLOATS)] == [0, 0]
    (said,) = caplog.messages
    assert str(tmp_path) in said and "Is a directory" in said and "NUMBA_CACHE_DIR" in said
