"""Choosing kernels: the fastest that run on a device, or those that the user names."""

import importlib
import logging
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

    Where those that `name` asks for, or `auto` prefers, are not to be had, the next are taken, with a line in the log.
    """
    preferred = "numba" if device.type == "cpu" else "triton"
    wanted = [preferred, "torch"] if name in ("auto", "torch") else [name, preferred, "torch"]
    for candidate in wanted[-1:] if name == "torch" else dict.fromkeys(wanted):
        try:
            module, kind = _CLASSES[candidate]
            _require(candidate, device)
            kernels: Kernels = getattr(importlib.import_module(module), kind)()
            return kernels
        except ImportError as error:
            logging.getLogger("twa_scale").warning(
                "no %s kernels for %s: %s; the next are taken", candidate, device, error
            )
    raise AssertionError("torch is always there")


def _require(name: str, device: torch.device) -> None:
    """Refuse kernels that are for other devices. Triton's interpreter, which is for tests, runs on a CPU."""
    if name == "numba" and device.type != "cpu":
        raise ImportError("they run on a CPU")
    if name == "triton" and device.type == "cpu" and not _interpreted():
        raise ImportError("they run on a GPU")


def _interpreted() -> bool:
    triton = importlib.import_module("triton")
    return bool(triton.knobs.runtime.interpret)
