"""Few files are open for any number of candidates, and a file that changed is detected."""

import json
import os
import resource
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.unit.conftest import num_open
from twa_scale.candidates import Candidate, open_candidates
from twa_scale.candidates.mapped import mapped
from twa_scale.errors import CandidateError, ConfigError


def write(directory: Path, count: int) -> list[Candidate]:
    for i in range(count):
        save_file({"w": torch.full((5,), float(i))}, directory / f"step-{i}.safetensors")
    return open_candidates(str(directory / "step-*"))


def take_all(held: list[int]) -> None:
    """Open files until this process may not open more."""
    with pytest.raises(OSError):
        while True:
            held.append(os.open(os.devnull, os.O_RDONLY))


def value(candidate: Candidate) -> float:
    out = torch.empty(2)
    candidate.read("w", 3, out)
    assert out[0] == out[1]
    return out[0].item()


def test_more_candidates_than_files_may_be_open(tmp_path: Path, few: int) -> None:
    candidates = write(tmp_path, 100)
    for order in (candidates, candidates[::-1]):
        assert [value(candidate) for candidate in order] == [float(candidates.index(c)) for c in order]
        assert num_open() <= few + 10
    for candidate in candidates:
        candidate.close()
    assert num_open() <= few + 2


def test_threads_share_few_files(tmp_path: Path, few: int) -> None:
    candidates = write(tmp_path, 40)
    with ThreadPoolExecutor(16) as pool:
        actual = list(pool.map(value, candidates * 25))
    assert actual == [float(i) for i in range(40)] * 25


def test_files_that_other_code_holds_open(tmp_path: Path, few: int) -> None:
    candidates = write(tmp_path, 12)
    stored: list[int] = []
    take_all(stored)
    assert [value(candidate) for candidate in candidates] == [float(i) for i in range(12)]
    for candidate in candidates:
        candidate.close()
    take_all(stored)
    with pytest.raises(CandidateError, match="ulimit -n"):
        value(candidates[0])
    for handle in stored:
        os.close(handle)
    assert value(candidates[0]) == 0.0


def test_replaced_file_is_refused(tmp_path: Path, few: int) -> None:
    candidates = write(tmp_path, 20)
    path = tmp_path / "step-0.safetensors"
    content = path.read_bytes()
    path.unlink()
    for candidate in candidates[1:]:
        value(candidate)
    with pytest.raises(CandidateError, match=r"step-0\.safetensors: cannot be opened: No such file.*could be read bef"):
        value(candidates[0])
    path.write_bytes(content)
    with pytest.raises(CandidateError, match=r"step-0\.safetensors: is not the file that it was"):
        value(candidates[0])


def test_mapping_with_no_descriptor_left(tmp_path: Path, few: int) -> None:
    candidates = write(tmp_path, 4)
    stored: list[int] = []
    take_all(stored)
    assert [mapped(candidate, "w")[0] for candidate in candidates[:3]] == [0, 1, 2]  # unused files are closed
    for candidate in candidates[:3]:
        candidate.close()
    assert value(candidates[3]) == 3  # its file is open, and mapping needs a second descriptor
    take_all(stored)
    with pytest.raises(CandidateError, match="ulimit -n"):
        mapped(candidates[3], "w")
    for handle in stored:
        os.close(handle)
    assert mapped(candidates[3], "w")[0] == 3


@pytest.mark.parametrize(("size", "reason"), [(20, "has 20 now"), (None, "has been written since it was opened")])
def test_file_that_changed_before_it_was_mapped_is_refused(tmp_path: Path, size: int | None, reason: str) -> None:
    candidate = write(tmp_path, 2)[0]
    with (path := tmp_path / "step-0.safetensors").open("r+b") as file:
        file.truncate(path.stat().st_size if size is None else size)
    os.utime(path, ns=(0, 0))
    with pytest.raises(CandidateError, match=rf"step-0\.safetensors: cannot be mapped: .*{reason}.* must not change"):
        mapped(candidate, "w")


def test_mapping_beyond_the_memory_of_the_process(tmp_path: Path) -> None:
    size, room = 1 << 30, 1 << 28  # of sparse files; other allocations of the process fit into this
    header = json.dumps({"w": {"dtype": "F32", "shape": [size // 4], "data_offsets": [0, size]}}).encode()
    header += b" " * (-len(header) % 8)
    for i in range(2):
        path = tmp_path / f"step-{i}.safetensors"
        path.write_bytes(len(header).to_bytes(8, "little") + header)
        os.truncate(path, 8 + len(header) + size)
    candidate = open_candidates(str(tmp_path / "step-*"))[0]
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + room, hard))
    try:
        with pytest.raises(ConfigError, match=r"cannot be mapped \(Cannot allocate memory\): it has more bytes"):
            mapped(candidate, "w")
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
