"""The properties of the GPU, the predicted bandwidth, and its copy rate."""

import torch

from tests.gpu.stages.setup import Setup
from tests.gpu_code import CARDS, Card, Kernel


def card_of(setup: Setup) -> Card | None:
    """Return the properties that determine the speed of this GPU. A tiny run uses those of an H100."""
    if setup.tiny:
        return CARDS["H100 SXM"]
    name = torch.cuda.get_device_name(setup.device)
    return next((card for known, card in CARDS.items() if known.split()[0] in name), None)


def predicted(setup: Setup, operation: str, store: str, n: int) -> float | None:
    """Return the predicted share of the GPU's bandwidth, from the disassembly of the kernel."""
    card = card_of(setup)
    if card is None or (setup.tiny and store != "dense32"):  # compiling takes seconds
        return None
    try:
        return Kernel(operation, store, card.target).share(card, n)
    except OSError:  # Triton was installed without its disassembler
        return None


def copy_rate(setup: Setup) -> float:
    """Return the number of bytes that a copy reads and writes in a second."""
    source = torch.ones(setup.size(1 << 29, 1 << 16), device=setup.device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / setup.device_seconds(lambda: target.copy_(source))
