"""The methods of a search. Each is a generator that yields an average and receives its loss."""

from collections.abc import Generator
from math import isfinite
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from typing_extensions import assert_never

from twa_scale.config import center_weights
from twa_scale.errors import ConfigError

Method = Literal["sweep", "greedy", "cma"]
Constraint = Literal["sum", "simplex"]
Array = npt.NDArray[np.float64]

_DECAYS = (0.5, 0.7, 0.8, 0.9, 0.95, 0.99)
_MAX_DIMENSIONS = 2000  # CMA-ES decomposes a square matrix of this size


class Proposal(NamedTuple):
    """An average to evaluate."""

    label: str
    coefficients: Array
    """(n,), or (n, G)."""


Proposals = Generator[Proposal, float, None]


def proposals(method: Method, start: Array, constraint: Constraint, seed: int) -> Proposals:
    """Return the generator of a method.

    Args:
        method: the name of the method.
        start: the current coefficients, (n, G).
        constraint: the constraint of `cma`.
        seed: the seed of `cma`.

    Raises:
        ConfigError: `cma` has too many coefficients, or is not installed.
    """
    match method:
        case "sweep":
            return sweep(len(start))
        case "greedy":
            return greedy(len(start))
        case "cma":
            return cma(start, constraint, seed)
        case _:
            assert_never(method)


def sweep(n: int) -> Proposals:
    """Propose uniform averages of the last K candidates for every K, then other shapes, largest windows first."""
    for k in range(1, n + 1):
        yield Proposal(f"lawa:{k}", np.array(center_weights(f"lawa:{k}", n)))
    for k in range(n, 1, -1):
        for shape in ("minus-sqrt", *(f"ema:{decay}" for decay in _DECAYS)):
            weights = np.array([0.0] * (n - k) + center_weights(shape, k))
            yield Proposal(f"{shape} of the last {k}", weights)


def greedy(n: int) -> Proposals:
    """Make the greedy soup (arXiv 2203.05482, Recipe 1): add candidates, best first, if the loss does not rise."""
    losses = []
    for i in range(n):
        losses.append((yield Proposal(f"candidate {i}", _uniform(n, [i]))))
    order = sorted(range(n), key=lambda i: losses[i] if isfinite(losses[i]) else np.inf)
    soup, best = order[:1], losses[order[0]]
    for i in order[1:]:
        loss = yield Proposal(f"mean of {sorted([*soup, i])}", _uniform(n, [*soup, i]))
        if loss <= best:
            soup, best = [*soup, i], loss


def cma(start: Array, constraint: Constraint, seed: int) -> Proposals:
    """Run CMA-ES (arXiv 1604.00772) from `start`, (n, G), without end.

    With `sum`, the coefficients are `start` + z minus the mean of z over the candidates, which keeps their sum. With
    `simplex`, they are softmax(log(`start`) + z).

    Raises:
        ConfigError: there are too many coefficients, or the package is missing.
    """
    numpy_state = _NumpyState()
    with numpy_state:
        strategy = _strategy(start, constraint, seed)
    generation = 0
    while True:
        with numpy_state:
            points = strategy.ask()
        losses = []
        for i, point in enumerate(points):
            a = _coefficients(np.asarray(point).reshape(start.shape), start, constraint)
            loss = yield Proposal(f"generation {generation}, {i}", a)
            losses.append(loss if isfinite(loss) else np.inf)
        worst = max((loss for loss in losses if isfinite(loss)), default=0.0)
        with numpy_state:
            strategy.tell(points, [loss if isfinite(loss) else worst + 1 for loss in losses])
        generation += 1


class _NumpyState:
    """A separate state of NumPy's global generator for CMA-ES, so that other code does not change its samples."""

    def __init__(self) -> None:
        self._own_state: Any = None

    def __enter__(self) -> None:
        self._others = np.random.get_state()
        if self._own_state is not None:
            np.random.set_state(self._own_state)

    def __exit__(self, *error: object) -> None:
        self._own_state = np.random.get_state()
        np.random.set_state(self._others)


def _strategy(start: Array, constraint: Constraint, seed: int) -> Any:
    if start.size > _MAX_DIMENSIONS:
        raise ConfigError(
            f"search: method 'cma' would search {start.size} coefficients ({start.shape[0]} candidates x "
            f"{start.shape[1]} groups), and can search {_MAX_DIMENSIONS}. Attach with fewer groups."
        )
    try:
        import cma as package
    except ImportError:
        raise ConfigError("search: method 'cma' needs the package cma: pip install twa-scale[search].") from None
    step = 1 / len(start) if constraint == "sum" else 0.5
    return package.CMAEvolutionStrategy(start.size * [0.0], step, {"seed": seed + 1, "verbose": -9})  # 0: no seed


def _coefficients(z: Array, start: Array, constraint: Constraint) -> Array:
    if constraint == "sum":
        moved: Array = start + z - z.mean(0)
        return moved
    logits = np.log(np.maximum(start, 1e-3)) + z
    powers = np.exp(logits - logits.max(0))
    result: Array = powers / powers.sum(0)
    return result


def _uniform(n: int, members: list[int]) -> Array:
    result = np.zeros(n)
    result[members] = 1 / len(members)
    return result
