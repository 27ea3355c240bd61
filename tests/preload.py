"""Modules that rank processes need, loaded once by the server from which the pool forks them.

A worker that imports DeepSpeed or compiles a kernel does so for itself alone, while the other ranks wait for it.
Nothing here may start a thread: a forked process has only the thread that called fork.
"""

import gc
import importlib
import os
from itertools import product
from typing import Literal

import torch

from tests.compile_once import compile_once
from twa_scale.kernels import Dense, Differences, Packed, Target
from twa_scale.kernels.kernels import Rows
from twa_scale.kernels.numba.compiled import NumbaKernels

MODULES = [
    "pytest",
    "setuptools",  # for DeepSpeed
    "torch._dynamo.backends.debugging",
    "torch._inductor.compile_fx",
    "torch.distributed.checkpoint",
    "torch.distributed.fsdp",
    "torch.distributed.tensor.debug",
    "torch.distributed.tensor.parallel",
    "torch.nn.parallel",
    "deepspeed",
    "deepspeed.module_inject.auto_ep_layer",
    "deepspeed.runtime.superoffload.superoffload_stage3",
    "fairscale.nn.data_parallel",
    "fairscale.optim.oss",
    "safetensors.torch",
    "twa_scale.run",
    "tests.ranks.cases",
]
FLOATS = (torch.float32, torch.bfloat16)
BITS: tuple[Literal[8, 4], ...] = (8, 4)
CPU = torch.device("cpu")


def compile_kernels() -> None:
    """Call the kernels that most rank tests use, so that workers have compiled and loaded kernels.

    numba keeps the machine code next to the sources. Only the first call after a change in `kernels/` compiles.
    """
    kernels = NumbaKernels()
    dense = [Dense.empty(3, 5, kind, CPU) for kind in FLOATS]
    quantized = [Packed.empty(3, 5, 0, bits, CPU) for bits in BITS]
    for rows, kind in [*product((None, *dense), FLOATS), *product(quantized, FLOATS[:1])]:
        target = Target(rows, torch.empty(5), torch.zeros(4, 4, dtype=torch.float64))
        kernels.make_deltas(torch.ones(3, 5, dtype=kind), [1 / 3] * 3, target, 0)
    differences = [Differences([*torch.ones(3, 5, dtype=kind)], torch.zeros(5)) for kind in FLOATS]
    every: list[Rows] = [*dense, *quantized, *differences]
    for deltas in every:
        kernels.project(deltas, torch.ones(5))
        kernels.combine(deltas, torch.ones(3), torch.zeros(5), 1.0, torch.empty(5))


torch.set_num_threads(1)
os.environ["DS_ACCELERATOR"] = "cpu"  # DeepSpeed reads it when it is imported
for module in MODULES:
    importlib.import_module(module)
compile_once()
compile_kernels()
gc.collect()
gc.freeze()  # these objects remain, so the garbage collector of a worker can skip them
