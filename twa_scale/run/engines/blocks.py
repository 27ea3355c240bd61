"""The blocks of a model."""

from torch import nn


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """Return the modules that are sharded and gathered as one: the items of every ModuleList that repeats one class."""
    blocks: list[nn.Module] = []
    for child in model.modules():
        if isinstance(child, nn.ModuleList) and len(child) > 1 and len({type(item) for item in child}) == 1:
            blocks += [item for item in child if any(True for _ in item.parameters())]
    return blocks
