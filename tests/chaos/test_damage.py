"""Damaged files of every format are read with the written values, or raise an error that names the file."""

import resource
import shutil
import signal
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.chaos.damage import damage
from tests.chaos.formats import FORMATS, Format, stored_bytes, write_torch
from tests.forked_modules import run_module
from twa_scale.errors import TwaError

DEEPSPEED = ("2/1-bf16", "2/2-fp32", "2/3-fp32")
QUICK, MANY = 12, 140  # number of cases of each format
SECONDS = 20  # time limit in seconds of one case on a busy machine; a case needs some milliseconds
MEMORY = 2 << 30  # bytes beyond the memory that the process has mapped


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write each format as NAME/0, NAME/1 and NAME/2."""
    directory = tmp_path_factory.mktemp("formats")
    for name, made in FORMATS.items():
        for seed in range(3):
            made.write(directory / name / str(seed), seed)
    return directory


@pytest.mark.parametrize("name", FORMATS)
def test_undamaged_files_are_read(written: Path, name: str) -> None:
    paths = [written / name / str(i) for i in range(3)]
    first, second = (FORMATS[name].read(paths[i], [paths[(i + 1) % 3], paths[(i + 2) % 3]]) for i in range(2))
    assert (first is None) == (second is None) and (first is None or first != second)


@pytest.mark.parametrize("name", FORMATS)
def test_few_random_damages(written: Path, tmp_path: Path, name: str) -> None:
    run(FORMATS[name], written / name, tmp_path, range(QUICK))


@pytest.mark.chaos
@pytest.mark.parametrize("name", FORMATS)
def test_many_random_damages(written: Path, tmp_path: Path, name: str, chaos_seed: int) -> None:
    run(FORMATS[name], written / name, tmp_path, range(chaos_seed, chaos_seed + MANY))


@pytest.fixture(scope="module")
def deepspeed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("deepspeed") / "written"
    run_module("tests.write_deepspeed", directory, timeout=600).check_returncode()
    for case in DEEPSPEED:
        for seed in range(3):
            shutil.copytree(directory / case, directory / case.replace("/", "-") / str(seed))
    return directory


@pytest.mark.chaos
@pytest.mark.parametrize("case", DEEPSPEED)
def test_many_random_damages_of_deepspeed(deepspeed: Path, tmp_path: Path, case: str, chaos_seed: int) -> None:
    """Padding is not read, so the CRC of a partition is not always checked."""
    made = Format(write_torch, has_checksum=None)
    run(made, deepspeed / case.replace("/", "-"), tmp_path, range(chaos_seed, chaos_seed + MANY))


def run(made: Format, originals: Path, directory: Path, seeds: range) -> None:
    """Damage copies of one original, and read each together with two undamaged ones."""
    original, *others = (originals / str(i) for i in range(3))
    expected = made.read(original, others)
    outcomes: Counter[str] = Counter()
    failures: list[str] = []
    with bounded_memory():
        for seed in seeds:
            copy = directory / f"copy-{seed}"
            shutil.copytree(original, copy)
            name = damage(copy, seed)
            outcome = outcome_of(made, original, copy, others, expected)
            outcomes[outcome.partition(":")[0]] += 1
            if outcome.startswith("WRONG"):
                failures.append(f"seed {seed} ({name}): {outcome}")
            shutil.rmtree(copy)
    print(f"{originals.name}: seeds {seeds.start} to {seeds.stop - 1}: {dict(outcomes)}")
    assert not failures, "\n".join(failures)
    assert set(outcomes) <= {"equal", "refused", "data differ"} and sum(outcomes.values()) == len(seeds)


def outcome_of(made: Format, original: Path, copy: Path, others: list[Path], expected: Any) -> str:
    try:
        with time_limit():
            actual = made.read(copy, others)
    except TwaError as error:
        if str(copy) not in str(error):
            return f"WRONG: the message does not name the file: {error}"
        if "weights_only=False" in str(error) or "add_safe_globals" in str(error):
            return f"WRONG: the message advises to trust the file: {error}"
        return "refused"
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        return f"WRONG: {type(error).__name__}: {error}"
    if made.has_checksum is None and layout(actual) == layout(expected):
        return "equal" if actual == expected else "data differ"
    wanted = expected if made.has_checksum else stored_bytes(original, copy, expected)
    return "equal" if actual == wanted else "WRONG: other values were read"


def layout(values: Any) -> Any:
    return {name: (shape, dtype) for name, (shape, dtype, _) in values.items()}


@contextmanager
def time_limit() -> Iterator[None]:
    def stop(*_: object) -> None:
        raise TimeoutError(f"it took longer than {SECONDS} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@contextmanager
def bounded_memory() -> Iterator[None]:
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (mapped + MEMORY, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
