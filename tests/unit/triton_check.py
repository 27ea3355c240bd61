"""Run in a separate process by test_kernels.py, where Triton interprets its kernels on the CPU."""

import torch

from tests.unit.test_kernel_segments import check_segments
from tests.unit.test_kernels import KINDS, check, make
from twa_scale.kernels import Segments, choose_kernels

kernels = choose_kernels("triton", torch.device("cpu"))
assert kernels.name == "triton"
torch.manual_seed(0)
for kind in KINDS:
    for n, m, start in ((1, 0, 0), (1, 1, 3), (3, 129, 0), (5, 1000, 37), (2, 5003, 127)):
        rows = make(kind, torch.randn(n, m), start)
        check(kernels, rows, torch.randn(m), torch.randn(n), torch.randn(m))
# Short segments; parts of 64 elements that two segments share; segments longer than a program; whole parts.
for kind in ("bfloat16", "packed4", "packed1"):
    for n, m, start, length, lead in (
        (1, 0, 0, 64, 3),
        (2, 129, 0, 27, 26),
        (3, 2500, 37, 100, 55),
        (1, 3003, 9, 2100, 1),
    ):
        check_segments(kernels, make(kind, torch.randn(n, m), start), Segments(length, lead, m))
for kind in KINDS[:-1]:
    check_segments(kernels, make(kind, torch.randn(2, 2600), 64), Segments(768, 64, 2600), [torch.bfloat16])
print("all kinds agree")
