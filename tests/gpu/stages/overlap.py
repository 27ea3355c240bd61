"""The overlap of `store_device: cpu` and `combine: forward` with the model, by time and by trace."""

import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import twa_scale
from tests.gpu.stages.alone import alone
from tests.gpu.stages.setup import Row, Setup, milliseconds
from tests.gpu.stages.synthetic import synthetic
from tests.gpu.stages.waits import build

BLOCKS, N = 8, 8
Times = list[tuple[float, float]]
"""Start and end, microseconds."""


def run(setup: Setup) -> Iterator[Row]:
    width, tokens = setup.size(2048, 64), setup.size(1 << 14, 8)
    x = torch.randn(tokens, width, device=setup.device)
    with alone(setup):
        model = build(setup.device, width, BLOCKS, sharded=True)

        def without() -> None:
            for _ in range(2):
                model(x).square().mean().backward()
                model.zero_grad()

        empty = setup.seconds(without)
        yield Row("forward and backward, twice", milliseconds(empty))
        taken: dict[str, float] = {}
        for device in ("auto", "cpu"):
            for combine in ("step", "forward"):
                model = build(setup.device, width, BLOCKS, sharded=True)
                config = {"store": "packed4", "store_device": device, "combine": combine, "coding": "center"}
                with synthetic(model, N) as candidates:
                    twa = twa_scale.attach(model, candidates, config)
                step = stepping(model, twa, x)
                name = f"store_device: {device}, combine: {combine}"
                taken[name] = setup.seconds(step)
                trace = overlap_text(kernels(setup, step))
                twa.close()
                ok = None
                if combine == "forward" and setup.cuda:
                    ok = taken[name] <= 1.02 * taken[f"store_device: {device}, combine: step"]
                more = f"{taken[name] / empty - 1:+.1%} of forward and backward"
                yield Row(name, f"{milliseconds(taken[name])}, {more}; {trace}", "forward no slower than step", ok)


def stepping(model: nn.Module, twa: twa_scale.TrainableAverage, x: Tensor) -> Callable[[], None]:
    """Return two steps, because a step leaves work to the next forward pass."""

    def step() -> None:
        for _ in range(2):
            model(x).square().mean().backward()
            twa.step()
            twa.zero_grad()

    return step


def kernels(setup: Setup, work: Callable[[], object]) -> dict[Any, Times]:
    """Return the times of kernels and copies by stream."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if setup.cuda else [])]
    with profile(activities=activities) as profiled:
        work()
        setup.wait()
    with tempfile.TemporaryDirectory(dir=setup.scratch) as folder:
        path = Path(folder) / "trace.json"
        profiled.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    actual: dict[Any, Times] = {}
    for event in events:
        if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset"):
            times = (float(event["ts"]), float(event["ts"]) + float(event["dur"]))
            actual.setdefault(event["args"].get("stream"), []).append(times)
    return actual


def overlap_text(streams: dict[Any, Times]) -> str:
    """Describe how long the busiest stream ran and paused, and the overlap with the other streams."""
    if not streams:
        return "no kernels in the trace"
    busy = {stream: merged(times) for stream, times in streams.items()}
    main = max(busy, key=lambda stream: length(busy[stream]))
    others = merged([times for stream, actual in busy.items() if stream != main for times in actual])
    pause = busy[main][-1][1] - busy[main][0][0] - length(busy[main])
    hidden = length(intersection(busy[main], others)) / length(others) if others else 0.0
    return (
        f"the model's stream ran {length(busy[main]) / 1e3:.2f} ms and paused {pause / 1e3:.2f}; others ran "
        f"{length(others) / 1e3:.2f} ms, {hidden:.0%} of it during the model"
    )


def merged(times: Sequence[tuple[float, float]]) -> Times:
    """Return the same intervals without overlaps."""
    ordered = sorted(times)
    ends = list(accumulate((end for _, end in ordered), max))
    actual: Times = []
    for (start, _), end in zip(ordered, ends, strict=True):
        if actual and start <= actual[-1][1]:
            actual[-1] = actual[-1][0], end
        else:
            actual.append((start, end))
    return actual


def intersection(one: Times, other: Times) -> Times:
    part = ((max(a, c), min(b, d)) for a, b in one for c, d in other)
    return [(start, end) for start, end in part if start < end]


def length(times: Times) -> float:
    return sum(end - start for start, end in times)
