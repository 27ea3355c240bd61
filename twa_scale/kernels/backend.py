"""The choice of kernels: the fastest for a device, or those that the user names."""

import importlib
import logging
import os
from typing import Literal

import torch

from twa_scale.kernels.kernels import Kernels

Name = Literal["auto", "torch", "numba", "triton"]
_CLASSES = {
    "triton": ("twa_scale.kernels.triton.fused", "TritonKernels"),
    "numba": ("twa_scale.kernels.numba.compiled", "NumbaKernels"),
    "torch": ("twa_scale.kernels.torch.reference", "TorchKernels"),
}


def choose_kernels(name: Name, device: torch.device) -> Kernels:
    """Return kernels for tensors on `device`.

    Kernels that cannot be imported, or do not support the device, are replaced by the next choice, with a warning in
    the log.

    Args:
        name: the kernels to use; `auto` for the fastest ones.
        device: the device of the tensors.
    """
    preferred = "numba" if device.type == "cpu" else "triton"
    choices = [preferred, "torch"] if name in ("auto", "torch") else [name, preferred, "torch"]
    for candidate in choices[-1:] if name == "torch" else dict.fromkeys(choices):
        try:
            module, kind = _CLASSES[candidate]
            _require(candidate, device)
            kernels: Kernels = getattr(importlib.import_module(module), kind)()
            return kernels
        except ImportError as error:
            logging.getLogger("twa_scale").warning(
                "no %s kernels for %s: %s; using the next choice", candidate, device, error
            )
    raise AssertionError("the torch kernels support every device")


def _require(name: str, device: torch.device) -> None:
    """Raise ImportError if kernels do not support the device. Triton's interpreter, used in tests, runs on a CPU."""
    if name == "numba" and device.type != "cpu":
        raise ImportError("they run on a CPU")
    if name == "triton" and device.type == "cpu" and not _interpreted():
        raise ImportError("they run on a GPU")


def _interpreted() -> bool:
    knobs = getattr(importlib.import_module("triton"), "knobs", None)  # Triton 3.2 has none
    return os.environ.get("TRITON_INTERPRET") == "1" if knobs is None else bool(knobs.runtime.interpret)
