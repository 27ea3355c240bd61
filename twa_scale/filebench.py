"""What reading candidates into a store and writing weights cost on this machine, against plain reads and copies."""

import os
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from twa_scale.basis import Gram
from twa_scale.bench import Measured
from twa_scale.comm import Group
from twa_scale.config import TwaConfig, validated
from twa_scale.sources import open_candidates
from twa_scale.sources.mapped import mapped
from twa_scale.spans import whole
from twa_scale.store import make_store
from twa_scale.streaming import Stream
from twa_scale.writer import TensorSpec, writing

_TIMES = 3
_BUFFER = 128 << 10  # bytes; what `cat` reads at a time


def run_streaming(
    stores: Sequence[str], elements: int, candidates: int, kernels: str, device: torch.device, directory: Path
) -> list[Measured]:
    """Write candidates of bfloat16 into a folder that goes away, and measure; they are in the page cache when read.

    Each rank has files of its own. Bytes are those of the files.

    Args:
        stores: names, as in the configuration.
        elements: of a candidate.
        candidates: n.
        kernels: as in the configuration.
        device: where the stores lie.
        directory: on the disk that is meant.
    """
    with TemporaryDirectory(prefix=".bench-", dir=directory) as temporary:
        paths = _write(Path(temporary), elements, candidates)
        nbytes = sum(path.stat().st_size for path in paths)
        found = [_best("plain read", lambda: _read(paths), nbytes)]
        for name in stores:
            config = validated(TwaConfig, {"store": name, "kernels": kernels}, "bench")
            attach = lambda config=config: _attach(paths, config, device)  # noqa: E731
            found.append(_best(f"attach, {name}", attach, nbytes))
        copy, out = Path(temporary) / "copy", Path(temporary) / "out"
        weights = torch.randn(elements, device=device)
        found.append(_best("copy and sync", lambda: _copy(paths[0], copy), copy_bytes := paths[0].stat().st_size))
        found.append(_best("export and sync", lambda: _export(weights, out), copy_bytes))
    return found


def _write(folder: Path, elements: int, n: int) -> list[Path]:
    base = torch.randn(elements)
    for i in range(n):
        _export(base + 1e-3 * torch.randn(elements), folder / str(i))
    return [folder / str(i) / "model.safetensors" for i in range(n)]


def _export(weights: torch.Tensor, out: Path) -> None:
    spec = TensorSpec("w", tuple(weights.shape), torch.bfloat16)
    with writing(out, [spec], Group.alone(), overwrite=True) as writer:
        writer.write(whole("w", spec.shape), weights)


def _copy(source: Path, target: Path) -> None:
    shutil.copyfile(source, target)
    with target.open("rb") as file:
        os.fsync(file.fileno())


def _read(paths: Sequence[Path]) -> None:
    buffer = bytearray(_BUFFER)
    for path in paths:
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def _attach(paths: Sequence[Path], config: TwaConfig, device: torch.device) -> None:
    opened = open_candidates([str(path) for path in paths], minimum=1)
    n = len(opened)
    store = make_store(config, n, device, lambda name: [mapped(candidate, name) for candidate in opened])
    gram = Gram(1, n, device, store.kernels)
    span = whole("w", opened[0].shape("w"))
    store.reserve(span)
    for chunk in Stream(opened, device, kernels=store.kernels).chunks([span], [1 / n] * n):
        gram.add(0, chunk.rows)
        store.fill(span, chunk.start, chunk.deltas, chunk.center)
    gram.values.cpu()
    store.close()
    for candidate in opened:
        candidate.close()


def _best(what: str, function: Callable[[], None], nbytes: float) -> Measured:
    seconds = []
    for _ in range(_TIMES):
        start = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - start)
    return Measured(what, min(seconds), nbytes)
