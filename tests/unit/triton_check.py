"""Run by test_kernels.py in a process of its own, where Triton interprets its kernels on the CPU."""

import torch

from tests.unit.test_kernels import KINDS, check, make
from twa_scale.kernels import choose_kernels

kernels = choose_kernels("triton", torch.device("cpu"))
assert kernels.name == "triton"
torch.manual_seed(0)
for kind in KINDS:
    for n, m, start in ((1, 0, 0), (1, 1, 3), (3, 129, 0), (5, 1000, 37), (2, 5003, 127)):
        rows = make(kind, torch.randn(n, m), start)
        check(kernels, rows, torch.randn(m), torch.randn(n), torch.randn(m))
print("all kinds agree")
