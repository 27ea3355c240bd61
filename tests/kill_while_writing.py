"""Writers that are killed at random points: `python -m tests.kill_while_writing DIRECTORY SEED`.

Prints a JSON object, by mode: what a reader found after each kill, and what the next start left. The modes are
`exchange`; `renames` for a file system that cannot exchange two names; and `between`, where each kill comes between the
two renames.
"""

import json
import multiprocessing
import os
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from itertools import count
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from safetensors.torch import load_file

from twa_scale.base.spans import whole_tensor
from twa_scale.output import TensorSpec, publish, writing
from twa_scale.output.provenance import provenance, with_provenance
from twa_scale.output.temporary import remove_leftovers
from twa_scale.ranks import Group

KILLS = {"exchange": 20, "renames": 20, "between": 2}
SPECS = [TensorSpec(name, (1000,), torch.float32) for name in "abc"]


def write(out: Path, generation: int) -> None:
    files = {"generation": str(generation).encode()}
    extra = with_provenance(provenance("a test", []), files)
    with writing(out, SPECS, Group.alone(), max_shard_size=4000, overwrite=True, **extra) as writer:
        for spec in SPECS:
            writer.write(whole_tensor(spec.name, spec.shape), torch.full(spec.shape, generation, dtype=torch.float32))


def read(out: Path) -> int:
    """Return the generation of an output, which all of its files have."""
    index = json.loads((out / "model.safetensors.index.json").read_text())
    actual = [load_file(out / file)[name] for name, file in index["weight_map"].items()]
    (generation,) = {value for tensor in actual for value in tensor.tolist()}
    assert len(actual) == 3 and (out / "generation").read_text() == str(int(generation))
    return int(generation)


def die_after(rename: Callable[[Path, Path], Path]) -> Callable[[Path, Path], Path]:
    def renamed(path: Path, target: Path) -> Path:
        rename(path, target)
        os.kill(os.getpid(), signal.SIGKILL)
        return target

    return renamed


def write_for_ever(out: Path, first: int, mode: str, ready: Connection) -> None:
    if mode != "exchange":
        publish.exchange = lambda *_: False  # type: ignore[attr-defined]
    if mode == "between":
        Path.rename = die_after(Path.rename)  # type: ignore[assignment, method-assign]
    for generation in count(first):
        ready.send(generation)  # the published generation is this one or the previous one
        write(out, generation)


def kill(out: Path, mode: str, chance: random.Random) -> dict[str, int]:
    out.parent.mkdir()
    write(out, 0)
    fork = multiprocessing.get_context("fork")
    seen: Counter[str] = Counter()
    started = 0
    for _ in range(KILLS[mode]):
        receive, send = fork.Pipe(duplex=False)
        process = fork.Process(target=write_for_ever, args=(out, started + 1, mode, send))
        process.start()
        send.close()
        started = receive.recv()
        time.sleep(chance.uniform(0, 0.1))
        assert process.pid is not None
        if mode != "between":
            os.kill(process.pid, signal.SIGKILL)
        process.join()
        while receive.poll():
            try:
                started = receive.recv()
            except EOFError:
                break
        seen["killed"] += process.exitcode == -signal.SIGKILL
        seen["hidden"] += len(list(out.parent.iterdir())) > 1
        if mode == "exchange" or out.exists():
            seen["complete"] += read(out) <= started
        else:
            seen["absent"] += 1
        remove_leftovers(out.parent, "out")
        seen["complete afterwards"] += read(out) <= started
        seen["left"] += list(out.parent.iterdir()) != [out]
    return seen


def main() -> None:
    torch.set_num_threads(1)
    chance = random.Random(int(sys.argv[2]))
    print(json.dumps({mode: kill(Path(sys.argv[1]) / mode / "out", mode, chance) for mode in KILLS}))


if __name__ == "__main__":
    main()
