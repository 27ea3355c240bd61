"""Names of tensors and modules without the prefixes that wrappers add, and the classes of modules."""

from collections.abc import Callable, Iterator
from typing import Any

from torch import nn
from torch.distributed.fsdp import FSDPModule

# The attribute of a wrapper that holds the wrapped module, by the class of the wrapper.
_WRAPPED_ATTRIBUTE = {
    "DistributedDataParallel": "module",
    "DataParallel": "module",
    "FullyShardedDataParallel": "_fsdp_wrapped_module",
    "ActivationWrapper": "_checkpoint_wrapped_module",
    "OptimizedModule": "_orig_mod",
    "DeepSpeedEngine": "module",
    "ShardedDataParallel": "module",
    "FlattenParamsWrapper": "_fpw_module",
}
_LIBRARIES = ("torch", "deepspeed", "fairscale")


def wrapped_attribute(module: nn.Module) -> str | None:
    """Return the name of the attribute that holds the wrapped module, or None if `module` is not a wrapper.

    The class decides, because models can have attributes that are called "module" too.
    """
    for kind in type(module).__mro__:
        if kind.__module__.split(".")[0] in _LIBRARIES and kind.__name__ in _WRAPPED_ATTRIBUTE:
            return _WRAPPED_ATTRIBUTE[kind.__name__]
    return None


def name_unwrapper(root: nn.Module) -> Callable[[str], str]:
    """Return a function that removes the attributes of wrappers from a name in `root`."""
    wrapped_paths = set()
    for path, module in root.named_modules(remove_duplicate=False):
        if (attribute := wrapped_attribute(module)) is not None:
            wrapped_paths.add(f"{path}.{attribute}" if path else attribute)

    def unwrap(name: str) -> str:
        parts = name.split(".")
        paths = (".".join(parts[: depth + 1]) for depth in range(len(parts)))
        return ".".join(part for part, path in zip(parts, paths, strict=True) if path not in wrapped_paths)

    return unwrap if wrapped_paths else str


def named_modules(root: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield (name, module) for every module in `root`. A wrapper has the name of the module that it wraps."""
    unwrap = name_unwrapper(root)
    for path, module in root.named_modules():
        yield unwrap(path), module


def unwrapped(module: nn.Module) -> nn.Module:
    """Return the module in a wrapper, or in several."""
    while (attribute := wrapped_attribute(module)) is not None:
        module = getattr(module, attribute)
    return module


def own_class(module: nn.Module) -> Any:
    """Return the class of a module. FSDP2 replaces it by a class that it derives."""
    return next(kind for kind in type(module).__mro__ if not issubclass(kind, FSDPModule))
