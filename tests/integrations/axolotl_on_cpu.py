"""A plugin with which Axolotl trains on the CPUs of several ranks, because it counts them as GPUs."""

from typing import Any

import axolotl.train
from axolotl.integrations.base import BasePlugin
from axolotl.loaders.model import ModelLoader

_set_device_map = ModelLoader._set_device_map_config


def _of_cpu(loader: Any) -> None:
    loader.cfg.device_map = {"": "cpu"}
    _set_device_map(loader)


class OnCpu(BasePlugin):
    """Moves the model of each rank to its CPU."""

    def register(self, cfg: Any) -> None:
        """Replace the two functions that fail on the second of several ranks without GPUs."""
        ModelLoader._set_device_map_config = _of_cpu
        axolotl.train.create_model_card = lambda *_: None  # the rows of its table have different metrics
