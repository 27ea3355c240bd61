"""Measurements of reading candidates into a store and of writing weights, relative to plain reads and copies."""

import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from twa_scale.average.bases import basis_class
from twa_scale.average.basis import Gram
from twa_scale.base.spans import whole_tensor
from twa_scale.candidates import open_candidates
from twa_scale.candidates.mapped import mapped
from twa_scale.candidates.streaming import Stream
from twa_scale.config import TwaConfig, validated
from twa_scale.merge import Combination, merge
from twa_scale.output import TensorSpec, writing
from twa_scale.ranks import Group
from twa_scale.store import make_store
from twa_scale.tools.bench.timing import Measured, Operation

_TIMES = 5
_EXPORT_BYTES = 1_050_000_000
_BUFFER = 128 << 10  # bytes per read, as in `cat`


def run_streaming(
    stores: Sequence[str], elements: int, candidates: int, kernels: str, device: torch.device, directory: Path
) -> list[Measured]:
    """Measure reading and writing with bfloat16 candidates in a temporary folder.

    Each rank has its own files. The files are in the page cache when they are read. Bytes are file sizes. Copies and
    exports have the size of as many candidates as fit into 1 GB. A merge reads all candidates and writes one.

    Args:
        stores: the stores, as in the configuration.
        elements: the number of elements of a candidate.
        candidates: the number of candidates n.
        kernels: the kernels, as in the configuration.
        device: the device of the stores.
        directory: the parent of the temporary folder, on the disk to measure.
    """
    with TemporaryDirectory(prefix=".bench-", dir=directory) as temporary:
        paths, out = _write(Path(temporary), elements, candidates), Path(temporary) / "out"
        nbytes = sum(path.stat().st_size for path in paths)
        measured = [_best(Operation("plain read", lambda: _read(paths), nbytes))]
        for name in stores:
            config = validated(TwaConfig, {"store": name, "kernels": kernels}, "bench")
            attach = lambda config=config: _attach(paths, config, device)  # noqa: E731
            measured.append(_best(Operation(f"attach, {name}", attach, nbytes)))
        merged_paths = paths[: max(1, _EXPORT_BYTES // paths[0].stat().st_size)]
        weights = torch.randn(elements * len(merged_paths), device=device)
        written, merged = nbytes * len(merged_paths) / len(paths), nbytes * (1 + 1 / len(paths))
        operations = [
            Operation("copy", lambda: _copy(merged_paths, out, sync=False), written),
            Operation("copy and sync", lambda: _copy(merged_paths, out, sync=True), written),
            Operation("export and sync", lambda: _export(weights, out), written),
            Operation("read all, copy one and sync", lambda: _read_and_copy(paths, out), merged),
            Operation("merge and sync", lambda: _merge(paths, out), merged),
        ]
        measured += _interleaved(operations, out)
    return measured


def _write(folder: Path, elements: int, n: int) -> list[Path]:
    base = torch.randn(elements)
    for i in range(n):
        _export(base + 1e-3 * torch.randn(elements), folder / str(i))
    return [folder / str(i) / "model.safetensors" for i in range(n)]


def _export(weights: torch.Tensor, out: Path) -> None:
    spec = TensorSpec("w", tuple(weights.shape), torch.bfloat16)
    with writing(out, [spec], Group.alone()) as writer:
        writer.write(whole_tensor("w", spec.shape), weights)


def _copy(sources: Sequence[Path], out: Path, *, sync: bool) -> None:
    out.mkdir()
    for i, source in enumerate(sources):
        target = out / str(i)
        shutil.copyfile(source, target)
        if sync:
            with target.open("rb") as file:
                os.fsync(file.fileno())


def _read_and_copy(paths: Sequence[Path], out: Path) -> None:
    _read(paths)
    _copy(paths[:1], out, sync=True)


def _merge(paths: Sequence[Path], out: Path) -> None:
    opened = open_candidates([str(path) for path in paths], minimum=1)
    merge(opened, out, Combination(lambda _: [1 / len(opened)] * len(opened)), Group.alone())
    for candidate in opened:
        candidate.close()


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
    gram = Gram(1, n, device, diagonal=basis_class(config.basis).norms_only)
    span = whole_tensor("w", opened[0].shape("w"))
    target = replace(store.reserve(span), products=gram.of(0))
    Stream(opened, store.kernels).make_deltas({span: target}, [1 / n] * n)
    gram.values.cpu()
    store.close()
    for candidate in opened:
        candidate.close()


def _interleaved(operations: Sequence[Operation], out: Path) -> list[Measured]:
    """Measure operations that write to `out` in rounds, so that other load on the disk affects all of them."""
    seconds: list[list[float]] = [[] for _ in operations]
    for _ in range(_TIMES):
        for operation, times in zip(operations, seconds, strict=True):
            shutil.rmtree(out, ignore_errors=True)
            os.sync()
            times.append(_time(operation.function))
    return [
        Measured(operation.name, min(times), operation.nbytes)
        for operation, times in zip(operations, seconds, strict=True)
    ]


def _best(operation: Operation) -> Measured:
    return Measured(operation.name, min(_time(operation.function) for _ in range(_TIMES)), operation.nbytes)


def _time(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start
