"""The corrections y of the coefficients, one column for each row of a matrix, and their training."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import nn

from twa_scale.average.bases import LinearBasis
from twa_scale.average.basis import Basis
from twa_scale.average.optimizer import check_state, make_optimizer
from twa_scale.average.rows.exchange import RowExchange
from twa_scale.average.rows.slots import Part, RowSlots
from twa_scale.average.rows.stored import PIECE_BYTES, read_rows, write_rows
from twa_scale.average.state.rows_file import BEST, LAST, MOMENT, RowsFile
from twa_scale.average.state.schema import RowsState
from twa_scale.base.spans import Span
from twa_scale.config import TwaConfig
from twa_scale.errors import StateError
from twa_scale.kernels import RowMap
from twa_scale.ranks import Pods, Reduction
from twa_scale.store import SegmentSums


def row_bytes(config: TwaConfig, n: int, rows: int) -> int:
    """Return the bytes of `RowCorrections` for n candidates and the rows of a rank.

    These are the bytes of y, its gradient, a copy, and the moments.
    """
    return 4 * (3 + row_moments(config)) * n * rows


def row_moments(config: TwaConfig) -> int:
    """Return the number of moments that the optimizer has for each correction."""
    trial = nn.Parameter(torch.zeros(1, 1))
    optimizer = make_optimizer(config, trial, config.row_lr)
    trial.grad = torch.ones_like(trial)
    optimizer.step()
    return sum(isinstance(value, torch.Tensor) and value.dim() == 2 for value in optimizer.state[trial].values())


class RowCorrections:
    """Holds and trains the corrections y of the coefficients of single rows.

    Row r of a tensor in group g has the weights w_r = c_r + sum_i u[i] delta_i,r with u = T_g (x_g + y_r). y starts at
    zero. Its learning rate is by default a tenth of that of x. x adapts to all rows of a group, and y to single rows.
    Each rank keeps the y of the rows that it holds. Only rows that a shard boundary cuts are exchanged within a shard
    group; the gradients of all rows are averaged over replicas.

    Args:
        config: the optimizer and the rate of the rows.
        slots: the rows of this rank.
        basis: T, of a basis whose directions are sums of deltas.
        coding: the meaning of the rows of the store.
        reduction: sums over ranks.
        device: the device of the weights.
    """

    def __init__(
        self,
        config: TwaConfig,
        slots: RowSlots,
        basis: Basis,
        coding: RowMap,
        reduction: Reduction,
        device: torch.device,
    ) -> None:
        assert isinstance(basis, LinearBasis)
        self._config = config
        self._slots = slots
        self._reduction = reduction
        self._exchange = RowExchange(config.row_exchange, reduction)
        self._basis = basis
        rows_of_u, k = basis.matrix.shape[1:]
        # The weights of the store's rows are an affine function of u. Its linear part and T are multiplied once per
        # group.
        zero = coding.row_weights(torch.zeros(rows_of_u, 1, dtype=torch.float64))
        linear = coding.row_weights(torch.eye(rows_of_u, dtype=torch.float64)) - zero
        self._maps = (linear[:-1] @ basis.matrix).to(device)
        """(G, rows of the store, k), float64."""
        self.values = nn.Parameter(torch.zeros(k, slots.num_columns, device=device))
        """y: (k, R), float32. Columns of a row on several ranks are bitwise equal."""
        self._gradient = torch.zeros_like(self.values)
        self.optimizer = make_optimizer(config, self.values, config.row_lr)

    def part(self, span: Span) -> Part | None:
        """Return the rows of a span, or None if its tensor has none."""
        return self._slots.parts.get(span)

    def add(self, part: Part, sums: SegmentSums) -> None:
        """Add the products over some rows of a span to the gradient."""
        gradient = self._maps[part.group].T.to(sums.products.device) @ sums.products[:-1]
        self._gradient[:, part.columns][:, sums.segments] += gradient.to(self._gradient.device, torch.float32)

    def reduce(self, factor: float) -> None:
        """Multiply the gradient by `factor`, the same on all ranks, and sum it over ranks. Collective."""
        self._gradient.mul_(factor)  # first, so that rounding errors have the same unit in every step
        self._slots.reduce_(self._gradient, self._reduction, self._exchange)
        self.values.grad = self._gradient

    def squared_norm(self) -> float:
        """Return the squared 2-norm of the gradient of all rows, with the same bits on all ranks. Collective."""
        assert self.values.grad is not None
        local = self.values.grad[:, self._slots.owned].double().square().sum()
        return float(self._reduction(local))

    def scale(self, factor: float) -> None:
        """Multiply the reduced gradient by `factor`."""
        assert self.values.grad is not None
        self.values.grad *= factor

    def clear(self) -> None:
        """Reset the gradient for a new step."""
        self._gradient.zero_()
        self.values.grad = None

    def weights(self, part: Part, weights: torch.Tensor) -> torch.Tensor:
        """Return the weights of the store's rows for each row of a span, (rows of the store, count), float32.

        Args:
            part: the rows of the span.
            weights: those of its group, without corrections: (rows of the store,), float64, on the device of y.
        """
        corrections = self._maps[part.group] @ self.values.detach()[:, part.columns].double()
        return (weights[:, None] + corrections).to(torch.float32)

    def largest(self) -> torch.Tensor:
        """Return a bound on |u| of the corrections of this rank's rows, (n + 1, G), float64 on the CPU."""
        y = self.values.detach().abs()
        largest = y.new_zeros(len(y), len(self._basis.matrix))
        largest.scatter_reduce_(1, self._slots.groups.expand(len(y), -1), y, "amax")
        return torch.einsum("gik,kg->ig", self._basis.matrix.abs(), largest.cpu().double())

    def state(self) -> dict[str, Any]:
        """Return y and the state of its optimizer for all rows, on the CPU of every rank. Collective.

        It does not depend on how rows are divided over ranks: tensors of columns become tensors (k, rows) by name.
        `maps` are the matrices from y to the averaging coefficients, for exports without the model. The rounding errors
        of gradients are not part of the state and are reset, so that a training that continues from the state has the
        same results as this one.
        """
        of_rows, others = self._moments()
        return {
            **self._small_state(),
            "values": self._slots.gather_rows(self.values.detach()),
            "moments": {key: self._slots.gather_rows(value) for key, value in of_rows.items()} | others,
        }

    def save(self, output: Path, pods: Pods, best: torch.Tensor | None) -> dict[str, Any]:
        """Return the state as `state` does, but with y and the moments of rows in a file. Collective.

        Each rank writes its own rows, so that it needs only a buffer of a few MiB.

        Args:
            output: the directory in which a new directory for the file is created.
            pods: all ranks.
            best: the corrections of this rank's rows in the best average of a run, (k, R), if they are saved, too.

        Raises:
            OutputError: the file could not be written; on every rank.
        """
        of_rows, others = self._moments()
        kinds = {LAST: self.values.detach(), **({} if best is None else {BEST: best})}
        kinds |= {MOMENT + key: value for key, value in of_rows.items()}
        stored = write_rows(output, self._slots, kinds, pods)
        return {**self._small_state(), "stored": stored.model_dump(), "values": {}, "moments": others}

    def _small_state(self) -> dict[str, Any]:
        """Return the part of the state that every rank has, and reset the rounding errors of gradients."""
        self._exchange.forget()
        group = self.optimizer.state_dict()["param_groups"][0]
        settings = deepcopy({key: value for key, value in group.items() if key != "params"})
        return {"settings": settings, "maps": self._averaging_maps(), "names": list(self._slots.counts)}

    def _moments(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """Return the moments of this rank's rows, (k, R), and copies of the moments that all rows share."""
        state = self.optimizer.state_dict()["state"].get(0, {})
        of_rows = {key: value for key, value in state.items() if self._is_of_columns(value)}
        return of_rows, {key: deepcopy(value) for key, value in state.items() if key not in of_rows}

    def norms(self) -> dict[str, torch.Tensor]:
        """Return the norms of the corrections of the averaging coefficients of all rows, by tensor. Collective."""
        squares, maps = self.values.new_zeros(1, self._slots.num_columns), self._averaging_maps().to(self.values.device)
        count = max(1, PIECE_BYTES // (8 * maps.shape[1]))
        for part in self._slots.parts.values():
            columns = part.columns
            parts = squares[0, columns].split(count), self.values.detach()[:, columns].split(count, 1)
            for out, y in zip(*parts, strict=True):
                out.copy_((maps[part.group] @ y.double()).norm(dim=0))
        return {name: norms[0] for name, norms in self._slots.gather_rows(squares).items()}

    def averaging(self, group_of: Mapping[str, int]) -> dict[str, torch.Tensor]:
        """Return the corrections of the averaging coefficients of all rows, (n, rows) float64 by tensor. Collective."""
        maps = self._averaging_maps()
        values = self._slots.gather_rows(self.values.detach())
        return {name: maps[group_of[name]] @ y.double() for name, y in values.items()}

    def _averaging_maps(self) -> torch.Tensor:
        """Return the matrices from y to the corrections of the averaging coefficients, (G, n, k), float64."""
        zero = self._basis.averaging(self._basis.matrix.new_zeros(self._basis.matrix.shape[1], 1))
        return torch.stack([self._basis.averaging(of_group) for of_group in self._basis.matrix]) - zero

    def local(self, state: RowsState, directory: Path | None) -> torch.Tensor:
        """Return the values of this rank's rows of a state, (k, R). Not collective.

        Args:
            state: the state.
            directory: its directory, if its values are in a file.

        Raises:
            StateError: the state has other tensors or shapes, or the file cannot be read.
        """
        with _opened(state, directory) as file:
            return self._values(state, file)

    def _values(self, state: RowsState, file: RowsFile | None) -> torch.Tensor:
        if state.stored and file:
            return self._read(file, state.stored.values)
        return self._of_all("rows.values", state.values)

    def _of_all(self, location: str, values: Mapping[str, torch.Tensor]) -> torch.Tensor:
        self._require_rows(location, {name: tuple(value.shape) for name, value in values.items()})
        return self._slots.local(values)

    def _read(self, file: RowsFile, kind: str) -> torch.Tensor:
        self._require_rows(f"rows: {kind}", file.shapes(kind))
        return read_rows(file, self._slots, kind, torch.empty_like(self.values, requires_grad=False))

    def checked(self, state: RowsState | None, directory: Path | None) -> dict[str, Any]:
        """Return the part of `state` of this rank, after a check that this average can continue from it.

        Args:
            state: the state.
            directory: its directory, if its values are in a file.

        Raises:
            StateError: names the first difference.
        """
        if state is None:
            raise StateError("state: rows: is missing; give the state of this average, or start a new run.")
        expected, saved = self._averaging_maps(), state.maps.to(torch.float64).cpu()
        if expected.shape != saved.shape or bool(
            ((expected - saved).abs() > 1e-3 * expected.abs().amax((1, 2), keepdim=True)).any()
        ):
            raise StateError("the basis of the state cannot be rebuilt from these candidates: its directions differ.")
        with _opened(state, directory) as file:
            values = self._values(state, file)
            moments: dict[str, Any] = {
                key: self._of_all(f"rows.moments.{key}", value) if isinstance(value, Mapping) else deepcopy(value)
                for key, value in state.moments.items()
            }
            moments |= {key: self._read(file, MOMENT + key) for key in file.moments} if file else {}
        groups = [{**deepcopy(state.settings), "params": [0]}]
        first = {key: value[:, :1] if self._is_of_columns(value) else value for key, value in moments.items()}
        trial = nn.Parameter(self.values.detach()[:, :1])
        check_state(self._config, trial, {"state": {0: first} if first else {}, "param_groups": groups})
        return {
            "values": values,
            "optimizer": {"state": {0: moments} if moments else {}, "param_groups": groups},
        }

    @torch.no_grad()
    def set(self, values: torch.Tensor | None) -> None:
        """Set y to `values`, (k, R), or to zero."""
        self._exchange.forget()
        if values is None:
            self.values.zero_()
        else:
            self.values.copy_(values)

    def _is_of_columns(self, value: Any) -> bool:
        return isinstance(value, torch.Tensor) and value.shape == self.values.shape

    def _require_rows(self, location: str, shapes: Mapping[str, tuple[int, ...]]) -> None:
        wanted = {name: (len(self.values), count) for name, count in self._slots.counts.items()}
        if wanted != shapes:
            name = next(name for name in {**wanted, **shapes} if wanted.get(name) != shapes.get(name))
            raise StateError(
                f"state: {location}: {name!r} has shape {shapes.get(name, 'none')} in the state, and "
                f"{wanted.get(name, 'none')} here: directions x rows. Give the state of this model, or start a new run."
            )


@contextmanager
def _opened(state: RowsState, directory: Path | None) -> Iterator[RowsFile | None]:
    """Open the file of rows of a state for a `with` block; None if the state has the rows itself.

    Raises:
        StateError: the directory of the state is not known, or the file cannot be read.
    """
    if state.stored is None:
        yield None
        return
    if directory is None:
        raise StateError(
            f"state: rows: they are in {state.stored.directory}, next to the state. Give load_state_dict the directory "
            "in which state_dict has written them."
        )
    with RowsFile(directory / state.stored.directory) as file:
        yield file
