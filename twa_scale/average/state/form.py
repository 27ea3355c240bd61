"""The state of one average: what it holds, and what a state must fit to continue it."""

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
    """Makes and checks states.

    Args:
        config: the settings of the average.
        layout: who is trained, in which group.
        basis: what the coefficients x multiply.
        fingerprint: of the candidates.
        conversions: of their stored tensors to those of the model.
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
        self._config = config
        self._layout = layout
        self._basis = basis
        self._fingerprint = fingerprint

    def settings(self) -> dict[str, Any]:
        """Return the settings of the average alone, also where the configuration is that of a whole run."""
        return self._config.model_dump(mode="json", include=set(TwaConfig.model_fields))

    def averaging(self, x: torch.Tensor) -> torch.Tensor:
        """Return the averaging coefficients a (n, G) of x (k, G)."""
        return self._basis.averaging(self._basis.expand(x.detach()))

    def state(
        self, x: torch.Tensor, optimizer: Mapping[str, Any], buffers: Mapping[str, torch.Tensor]
    ) -> dict[str, Any]:
        """Return the state as plain values and tensors on the CPU that share nothing with the average.

        Args:
            x: (k, G) float64.
            optimizer: its state.
            buffers: BatchNorm statistics by their live name.
        """
        layout = self._layout
        return {
            "version": VERSION,
            "config": self.settings(),
            "groups": list(layout.groups),
            "group_of": {a: group for n, group in layout.group_of.items() for a in layout.held_as[n]},
            "buffer_names": {name: layout.source(name) for name in layout.buffers},
            "tied": [list(names) for names in layout.held_as.values() if len(names) > 1],
            "x": x.detach().cpu().clone(),
            "coefficients": self.averaging(x).cpu(),
            "center_weights": self._basis.center_weights.cpu(),
            "optimizer": deepcopy(dict(optimizer)),
            "buffers": {name: buffer.detach().cpu().clone() for name, buffer in buffers.items()},
            "fingerprint": self._fingerprint.state_dict(),
            "conversions": self._conversions,
        }

    def checked(self, state: Any, x: nn.Parameter, buffers: Mapping[str, torch.Tensor]) -> AverageState:
        """Return a state that continues this average.

        Args:
            state: what a user gives.
            x: the coefficients that it would replace.
            buffers: those of the model.

        Raises:
            StateError: names what differs.
        """
        saved = checked(AverageState, state, "state")
        self._fingerprint.require(saved.fingerprint.build())
        require_same_settings(self.settings(), saved.config.model_dump(mode="json"))
        given, shape = saved.x.to(x), tuple(x.shape)
        if tuple(given.shape) != shape or list(self._layout.groups) != saved.groups:
            raise StateError(f"the state has {tuple(given.shape)} coefficients, this run {shape}: other groups.")
        a = self.averaging(given)
        if not torch.allclose(a, saved.coefficients.to(a), rtol=1e-6, atol=1e-6):
            raise StateError("the basis of the state cannot be rebuilt from these candidates: its directions differ.")
        check_state(self._config, x, saved.optimizer)
        require_same_shapes(buffers, saved.buffers)
        return saved
