"""The blocks of a model."""

from torch import nn


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """Return the modules to shard as units: the items of every ModuleList whose items have the same class."""
    blocks: list[nn.Module] = []
    for child in model.modules():
        if isinstance(child, nn.ModuleList) and len(child) > 1 and len({type(item) for item in child}) == 1:
            blocks += [item for item in child if any(True for _ in item.parameters())]
    return blocks
