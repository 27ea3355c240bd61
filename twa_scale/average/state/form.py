"""Create and check the state of one average."""

from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import nn

from twa_scale.average.basis import Basis
from twa_scale.average.layout import Layout
from twa_scale.average.optimizer import check_state
from twa_scale.average.state.run_settings import require_same_settings, require_same_shapes
from twa_scale.average.state.schema import VERSION, AverageState, checked
from twa_scale.candidates.conversion import Conversion
from twa_scale.candidates.fingerprint import Fingerprint
from twa_scale.config import TwaConfig
from twa_scale.errors import StateError


class StateForm:
    """The makers and the checks of the state of one average.

    Args:
        config: the settings of the average.
        layout: the trained tensors and their groups.
        basis: the basis of the coefficients x.
        fingerprint: the fingerprint of the candidates.
        conversions: for each candidate, the conversion of its stored tensors to those of the model.
    """

    def __init__(
        self,
        config: TwaConfig,
        layout: Layout,
        basis: Basis,
        fingerprint: Fingerprint,
        conversions: Sequence[Conversion],
    ) -> None:
        self._conversions = [conversion.state_dict() for conversion in conversions]
        self.config = config
        self._layout = layout
        self._basis = basis
        self._fingerprint = fingerprint

    def settings(self) -> dict[str, Any]:
        """Return the settings of the average, without the other settings of a run."""
        return self.config.model_dump(mode="json", include=set(TwaConfig.model_fields))

    def averaging(self, x: torch.Tensor) -> torch.Tensor:
        """Return the averaging coefficients a (n, G) for x (k, G)."""
        return self._basis.averaging(self._basis.expand(x.detach()))

    def state(
        self,
        x: torch.Tensor,
        optimizer: Mapping[str, Any],
        rows: Mapping[str, Any] | None,
        buffers: Mapping[str, torch.Tensor],
    ) -> dict[str, Any]:
        """Return the state: plain values and copies of tensors on the CPU.

        Args:
            x: the coefficients, (k, G) float64.
            optimizer: the state of the optimizer.
            rows: the state of the corrections of rows, if there are any, with the names of their tensors.
            buffers: BatchNorm statistics, by their names in the model.
        """
        layout = self._layout
        return {
            "version": VERSION,
            "config": self.settings(),
            "groups": list(layout.groups),
            "group_of": {a: group for n, group in layout.group_of.items() for a in layout.names_in_candidates[n]},
            "experts": {
                a: list(experts.groups) for n, experts in layout.experts.items() for a in layout.names_in_candidates[n]
            },
            "buffer_names": {name: layout.source(name) for name in layout.buffers},
            "tied": [list(names) for names in layout.names_in_candidates.values() if len(names) > 1],
            "x": x.detach().cpu().clone(),
            "coefficients": self.averaging(x).cpu(),
            "center_weights": self._basis.center_weights.cpu(),
            "optimizer": deepcopy(dict(optimizer)),
            "rows": rows
            and {**rows, "names": {a: name for name in rows["names"] for a in layout.names_in_candidates[name]}},
            "buffers": {name: buffer.detach().cpu().clone() for name, buffer in buffers.items()},
            "fingerprint": self._fingerprint.state_dict(),
            "conversions": self._conversions,
        }

    def checked(self, state: Any, x: nn.Parameter, buffers: Mapping[str, torch.Tensor]) -> AverageState:
        """Return `state` after a check that this average can continue from it.

        Args:
            state: a state from the user.
            x: the coefficients of this average, (k, G).
            buffers: the buffers of the model.

        Raises:
            StateError: names the first difference.
        """
        saved = checked(AverageState, state, "state")
        self._fingerprint.require(saved.fingerprint.build())
        config = self.config.with_lr(saved.config.lr)  # the average adopts this rate
        require_same_settings(config.model_dump(mode="json"), saved.config.model_dump(mode="json"))
        saved_x, shape = saved.x.to(x), tuple(x.shape)
        if tuple(saved_x.shape) != shape or list(self._layout.groups) != saved.groups:
            raise StateError(f"the state has {tuple(saved_x.shape)} coefficients, this run {shape}: other groups.")
        a = self.averaging(saved_x)
        if not torch.allclose(a, saved.coefficients.to(a), rtol=1e-6, atol=1e-6):
            raise StateError("the basis of the state cannot be rebuilt from these candidates: its directions differ.")
        check_state(self.config, x, saved.optimizer)
        require_same_shapes(buffers, saved.buffers)
        return saved
