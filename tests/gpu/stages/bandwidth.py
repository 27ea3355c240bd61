"""The bandwidth of project and combine for each store, compared with a copy and with the predicted bandwidth."""

from collections.abc import Callable, Iterator

import torch

from tests.gpu.stages.cards import card_of, copy_rate, predicted
from tests.gpu.stages.rows import STORES, random_rows
from tests.gpu.stages.setup import Row, Setup, milliseconds
from twa_scale.kernels import Kernels, choose_kernels

CASES = [*((store, 16, 200_000_000) for store in STORES), ("packed4", 16, 800_000_000), ("packed4", 64, 100_000_000)]
WITHIN = 0.2
"""How far a prediction may be off, of itself."""


def run(setup: Setup) -> Iterator[Row]:
    copy, kernels = copy_rate(setup), choose_kernels("auto", setup.device)
    for store, n, elements in CASES:
        yield from measured(setup, kernels, store, n, setup.size(elements, elements // 10_000), copy)


def measured(setup: Setup, kernels: Kernels, store: str, n: int, m: int, copy: float) -> Iterator[Row]:
    """Yield a row for each operation on n rows of m elements; `copy` is the rate of a copy."""
    card, rows = card_of(setup), random_rows(store, n, m, setup.device)
    gradient, base = torch.randn(m, device=setup.device), torch.randn(m, device=setup.device)
    weights, out = torch.randn(n, device=setup.device), torch.empty(m, device=setup.device, dtype=torch.bfloat16)
    work: dict[str, tuple[Callable[[], object], int]] = {
        "project": (lambda: kernels.project(rows, gradient), rows.nbytes + 4 * m),
        "combine": (lambda: kernels.combine(rows, weights, base, 0.7, out), rows.nbytes + 6 * m),
    }
    for operation, (function, nbytes) in work.items():
        seconds = setup.device_seconds(function)
        rate, expected = nbytes / seconds, predicted(setup, operation, store, n)
        actual = f"{milliseconds(seconds)}, {rate / 1e12:.2f} TB/s, {rate / copy:.0%} of copy"
        share = rate / card.bandwidth if card else 0.0
        yield Row(
            f"`{store}`, {operation}, n = {n}, {m / 1e6:.0f} M elements",
            f"{actual}, {share:.0%} of the card" if card else actual,
            f"{expected:.0%} of the card" if expected else "",
            abs(share / expected - 1) <= WITHIN if expected and not setup.tiny else None,
        )
