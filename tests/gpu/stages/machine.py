"""Versions, the GPU, and its copy rate."""

import platform
from collections.abc import Iterator

import torch

from tests.gpu.stages.cards import card_of, copy_rate
from tests.gpu.stages.setup import Row, Setup, gigabytes


def run(setup: Setup) -> Iterator[Row]:
    yield Row("torch, python", f"{torch.__version__}, {platform.python_version()}")
    if setup.cuda:
        properties = torch.cuda.get_device_properties(setup.device)
        built = f"CUDA {torch.version.cuda}" if torch.version.hip is None else f"ROCm {torch.version.hip}"
        yield Row("card", f"{properties.name}, {gigabytes(properties.total_memory)}, {built}")
        free, _ = torch.cuda.mem_get_info(setup.device)
        yield Row("free memory", gigabytes(free))
    rate, card = copy_rate(setup), card_of(setup)
    share = f"{rate / card.bandwidth:.0%} of {card.bandwidth / 1e12:.2f} TB/s" if card else ""
    yield Row("copy, read and written", f"{rate / 1e12:.3f} TB/s", share)
