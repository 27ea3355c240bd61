"""A reference in one process: whole candidates in float64, textbook bases, and gradients by autograd.

Nothing here is shared with the package: the two only agree when both are right.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from tests.sums import weighted

State = Mapping[str, Tensor]
Loss = Callable[[nn.Module, Any], Tensor]
ZERO = 1e-9  # relative size below which a float64 direction is only rounding


@dataclass
class Group:
    """Tensors that share coefficients, of D elements: w = origin + vectors @ x, or candidates @ softmax(x)."""

    name: str
    shapes: dict[str, torch.Size]
    candidates: Tensor  # D x n
    center_weights: Tensor  # n
    origin: Tensor  # D
    vectors: Tensor  # D x k
    convex: bool
    x: Tensor  # k, trained
    rows: dict[str, Tensor]  # for tensors whose rows have corrections: k x rows, trained

    def flat(self) -> Tensor:
        """Return the weights at x, D elements."""
        return self.candidates @ self.x.softmax(0) if self.convex else self.origin + self.vectors @ self.x

    def tensors(self) -> dict[str, Tensor]:
        """Return the weights at x by tensor name."""
        sizes = [shape.numel() for shape in self.shapes.values()]
        pieces = dict(zip(self.shapes, self.flat().split(sizes), strict=True))
        for name, vectors in zip(self.shapes, self.vectors.split(sizes), strict=True):
            if name in self.rows:
                y = self.rows[name]
                by_row = vectors.view(y.shape[1], -1, y.shape[0])  # rows x elements of a row x k
                pieces[name] = pieces[name] + torch.einsum("rek,kr->re", by_row, y).flatten()
        return {name: piece.view(self.shapes[name]) for name, piece in pieces.items()}

    def coefficients(self) -> Tensor:
        """Return the coefficients a of w = sum_i a_i w_i, n elements; NaN if dependent candidates allow several."""
        a = _solve(self.candidates, self.flat().detach())
        return a if a is not None else torch.full((self.candidates.shape[1],), torch.nan, dtype=torch.float64)


@dataclass
class Trained:
    """The weights by name before the first step and after each, and the averaging coefficients (n x G) at both ends."""

    weights: list[dict[str, Tensor]]
    coefficients: list[Tensor]
    groups: dict[str, list[str]]
    norms: list[float]  # of the gradient of all weights, before it is clipped


def train(
    model: nn.Module, loss: Loss, candidates: Sequence[State], config: Mapping[str, Any], steps: Sequence[Any]
) -> Trained:
    """Train the average of `candidates` on `steps`. Each is a list of micro-batches whose mean loss is the step's loss.

    `config` holds the keys of TwaConfig. `model` gives the architecture; it is left in float64 with the last values.
    """
    model.double()
    b = center_weights(config.get("center", "mean"), len(candidates))
    trainable = _selected(model, config)
    groups = [
        _group(name, members, candidates, b, config)
        for name, members in _grouped(trainable, config.get("groups", "global")).items()
    ]
    fixed = {
        name: weighted(b, (state[name].double() for state in candidates))
        for name, _ in model.named_parameters()
        if name not in trainable
    }
    options: dict[str, Any] = {"name": "adamw", "lr": 0.01, "weight_decay": 0.0} | dict(config.get("optimizer", {}))
    x = [group.x for group in groups]
    rows = [y for group in groups for y in group.rows.values()]
    row_lr = options.pop("row_lr", options["lr"] / 10)
    trained = [{"params": x}, *([{"params": rows, "lr": row_lr}] if rows else [])]
    optimizer = _optimizer_class(options.pop("name"))(trained, **options)
    scored = Scored(model, loss)
    result = Trained([], [], {group.name: list(group.shapes) for group in groups}, [])

    def weights() -> dict[str, Tensor]:
        return {name: value for group in groups for name, value in group.tensors().items()}

    def record() -> None:
        result.weights.append({name: value.detach().clone() for name, value in (fixed | weights()).items()})

    def record_coefficients() -> None:
        result.coefficients.append(torch.stack([group.coefficients() for group in groups], dim=1))

    record()
    record_coefficients()
    for micro_batches in steps:
        optimizer.zero_grad()
        gradients: dict[str, Tensor] = {}
        for data in micro_batches:
            moved = weights()
            for name, value in moved.items():
                value.register_hook(partial(_add, gradients, name))
            values = {f"model.{name}": value for name, value in (fixed | moved).items()}
            (functional_call(scored, values, (data,)) / len(micro_batches)).backward()
        if config.get("max_weight_grad_norm"):
            whole = [nn.Parameter(gradient) for gradient in gradients.values()]
            for p, gradient in zip(whole, gradients.values(), strict=True):
                p.grad = gradient.clone()
            norm = torch.nn.utils.clip_grad_norm_(whole, config["max_weight_grad_norm"])
            factor = torch.stack([p.grad.norm() for p in whole if p.grad is not None]).norm() / norm
            for parameter in (*x, *rows):
                if parameter.grad is not None:
                    parameter.grad *= factor  # projections are linear in the gradient
            result.norms.append(float(norm))
        if config.get("max_grad_norm"):
            torch.nn.utils.clip_grad_norm_([*x, *rows], config["max_grad_norm"])
        optimizer.step()
        record()
    record_coefficients()
    return result


def _add(gradients: dict[str, Tensor], name: str, gradient: Tensor) -> None:
    gradients[name] = gradients[name] + gradient if name in gradients else gradient


class Scored(nn.Module):
    """A model and its loss as one module, so that functional_call can set the weights as "model.NAME"."""

    def __init__(self, model: nn.Module, loss: Loss) -> None:
        super().__init__()
        self.model, self.loss = model, loss

    def forward(self, data: Any) -> Tensor:
        return self.loss(self.model, data)


def _group(name: str, members: list[str], candidates: Sequence[State], b: Tensor, config: Mapping[str, Any]) -> Group:
    w = torch.stack([torch.cat([state[m].double().flatten() for m in members]) for state in candidates], dim=1)
    center = w @ b
    basis = config.get("basis", "normalized")
    deltas = w - center[:, None]
    norms = deltas.norm(dim=0)
    norms = norms.where(norms > ZERO * w.norm(dim=0), 0)
    start = _start(config.get("start", "center"), center, w)
    shapes = {m: candidates[0][m].shape for m in members}
    if basis == "simplex":
        assert config.get("start", "center") == "center", "the corners of the simplex are infinitely far away"
        return Group(name, shapes, w, b, center, deltas, True, b.log().requires_grad_(), {})
    if basis == "normalized":
        origin, vectors = center, deltas[:, norms > 0] / norms[norms > 0]
    elif basis == "orthonormal":
        origin, vectors = torch.zeros_like(center), _schmidt(w)
    else:
        origin, vectors = center, _principal(w, config.get("num_components"))
    if config.get("units", "delta") == "delta":
        vectors = vectors * norms.mean()
    if not vectors.any():
        origin, vectors = center, vectors[:, :0]
    x = torch.linalg.lstsq(vectors, (start - origin)[:, None]).solution[:, 0] if vectors.numel() else vectors[0].clone()
    rows = {}
    if str(config.get("groups")).endswith("+row"):
        # All matrices of the test model have their rows in the first dimension, also its convolution.
        counts = {m: shape[0] for m, shape in shapes.items() if len(shape) > 1 and shape[0] > 1}
        rows = {m: torch.zeros(len(x), count, dtype=torch.float64, requires_grad=True) for m, count in counts.items()}
    return Group(name, shapes, w, b, origin, vectors, False, x.requires_grad_(), rows)


def _schmidt(w: Tensor) -> Tensor:
    """Orthogonalize the columns in order (TWA, ICLR 2023, Algorithm 1). Dependent columns give none."""
    actual: list[Tensor] = []
    for column in w.T:
        rest = column.clone()
        for _ in range(2):  # the second pass removes the rounding errors of the first
            for direction in actual:
                rest = rest - (direction @ rest) * direction
        if rest.norm() > 1e-7 * column.norm():
            actual.append(rest / rest.norm())
    return torch.stack(actual, dim=1) if actual else w[:, :0]


def _principal(w: Tensor, keep: int | None) -> Tensor:
    """Return the leading left singular vectors of the mean-centered candidates (DLDR, arXiv 2103.11154)."""
    u: Tensor
    u, s, _ = torch.linalg.svd(w - w.mean(dim=1, keepdim=True), full_matrices=False)
    return u[:, s > ZERO * w.norm() + 1e-7 * s.max()][:, :keep]


def _solve(w: Tensor, target: Tensor) -> Tensor | None:
    """Return the unique a with w @ a = target, or NaN."""
    s = torch.linalg.svdvals(w)
    if w.shape[0] < w.shape[1] or s[-1] < 1e-6 * s[0]:
        return None
    solution: Tensor = torch.linalg.lstsq(w, target[:, None], driver="gelsd").solution
    return solution[:, 0]


def _start(start: str | int, center: Tensor, w: Tensor) -> Tensor:
    return center if start == "center" else w[:, _index(start)]


def _index(which: str | int) -> int:
    return {"first": 0, "last": -1}[which] if isinstance(which, str) else which


def _selected(model: nn.Module, config: Mapping[str, Any]) -> list[str]:
    include, exclude = config.get("include") or [""], config.get("exclude", [])
    return [
        name
        for name, p in model.named_parameters()
        if p.requires_grad and any(re.search(i, name) for i in include) and not any(re.search(e, name) for e in exclude)
    ]


def _grouped(names: list[str], groups: str | list[str]) -> dict[str, list[str]]:
    def key(name: str) -> str:
        if isinstance(groups, list):
            return next((pattern for pattern in groups if re.search(pattern, name)), "rest")
        if groups == "block":
            number = re.match(r".*?\.\d+(?=\.)", name)
            return number[0] if number else name.split(".")[0]
        return {"global": "global", "tensor": name}[groups]

    groups = groups.removesuffix("+row") if isinstance(groups, str) else groups
    result: dict[str, list[str]] = {}
    for name in names:
        result.setdefault(key(name), []).append(name)
    return result


def center_weights(center: Any, n: int) -> Tensor:
    match center:
        case "mean":
            b = [1.0] * n
        case "first" | "last" | int():
            b = [0.0] * n
            b[_index(center)] = 1.0
        case "linear":
            b = [1.0] * n  # a rate that decreases by the same amount at every candidate
        case "minus-sqrt":
            b = [((i + 1) / n) ** 0.5 - (i / n) ** 0.5 for i in range(n)]  # rate 1 - sqrt(t)
        case str():
            b = [float(center.removeprefix("ema:")) ** (n - 1 - i) for i in range(n)]
        case _:
            b = center
    weights = torch.tensor(b, dtype=torch.float64)
    return weights / weights.sum()


def _optimizer_class(name: str) -> type[torch.optim.Optimizer]:
    return {
        "adamw": torch.optim.AdamW,
        "sgd": torch.optim.SGD,
        "rmsprop": torch.optim.RMSprop,
        "adam": torch.optim.Adam,
    }[name]
