"""The update of the shard of one rank of 64 of a 70B Llama, compared with a step of AdamW(fused=True) on it."""

import time
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from tests.gpu.stages.rows import randomize
from tests.gpu.stages.setup import Row, Setup, milliseconds
from tests.launches import LLAMA_70B, rows_of
from twa_scale.base.spans import Span
from twa_scale.config import TwaConfig
from twa_scale.kernels import Dense, Packed
from twa_scale.store import Store, make_store
from twa_scale.tools.bench.baselines import coefficient_optimizer

N, RANKS = 16, 64


def run(setup: Setup) -> Iterator[Row]:
    sizes = [rows_of(shape, 0, RANKS) for shape in LLAMA_70B]
    if setup.tiny:
        sizes = [min(size, 3000) for size in sizes[:12]]
    total = sum(sizes)
    yield Row("the shard", f"{total / 1e6:.0f} M elements in {len(sizes)} tensors")
    adamw = setup.seconds(optimizer_of(sizes, setup.device).step)
    yield Row("AdamW(fused=True)", milliseconds(adamw))
    for store in ("packed4", "packed8"):
        for name, parts in (("", sizes), (", as one tensor", [total])):
            update = Update(store, parts, setup.device)
            seconds = setup.seconds(update)
            start = time.perf_counter()
            update()
            launched = time.perf_counter() - start
            setup.wait()
            measured = f"{milliseconds(seconds)}, {seconds / adamw:.2f} of AdamW, host {milliseconds(launched)}"
            yield Row(f"`{store}`, whole update{name}", measured, "no slower than AdamW", seconds <= adamw)
            del update


def optimizer_of(sizes: list[int], device: torch.device) -> torch.optim.Optimizer:
    parameters = [nn.Parameter(torch.randn(size, device=device)) for size in sizes]
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    return torch.optim.AdamW(parameters, lr=1e-9, fused=True)


class Update:
    """Project, copy the products to the host, step on the coefficients, and combine, as a step does."""

    def __init__(self, store: str, sizes: list[int], device: torch.device) -> None:
        config = TwaConfig(store=store)  # type: ignore[arg-type]
        self._store: Store = make_store(config, N, device, lambda _: [])
        self._spans = [Span(str(i), 0, size) for i, size in enumerate(sizes)]
        for span in self._spans:
            target = self._store.reserve(span)
            assert isinstance(target.rows, Dense | Packed) and target.center is not None
            randomize(target.rows)
            target.center.normal_()
        self._gradient, self._weights = (torch.randn(sum(sizes), device=device) for _ in range(2))
        self._optimizer = coefficient_optimizer(N, 1, torch.device("cpu"))
        (self._x,) = self._optimizer.param_groups[0]["params"]

    def __call__(self) -> None:
        sums = torch.zeros(N + 1, dtype=torch.float64, device=self._gradient.device)
        for span, part in self._cut(self._gradient):
            sums += self._store.project(span, part, False)
        self._x.grad = sums.cpu()[None, :-1].float()
        self._optimizer.step()
        u = self._x.detach()[0].to(self._gradient.device)
        for span, part in self._cut(self._weights):
            self._store.combine(span, u, 1.0, part)

    def _cut(self, vector: Tensor) -> Iterator[tuple[Span, Tensor]]:
        return zip(self._spans, vector.split([len(span) for span in self._spans]), strict=True)
