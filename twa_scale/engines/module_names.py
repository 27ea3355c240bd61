"""Names of a module's tensors as its own state dict has them before anything wrapped it."""

from collections.abc import Callable, Iterator

from torch import nn

# The attribute in which a wrapper holds the module that it wraps, by the wrapper's class.
_HOLDS = {
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


def wrapped_in(module: nn.Module) -> str | None:
    """Return the attribute under which `module` holds what it wraps, or None if it is no wrapper.

    The class decides, not the attribute's name: models have attributes that are called "module".
    """
    for kind in type(module).__mro__:
        if kind.__module__.split(".")[0] in _LIBRARIES and kind.__name__ in _HOLDS:
            return _HOLDS[kind.__name__]
    return None


def unwrapping(root: nn.Module) -> Callable[[str], str]:
    """Return a function that takes the steps into wrappers out of a name in `root`."""
    steps = set()
    for path, module in root.named_modules(remove_duplicate=False):
        if (held := wrapped_in(module)) is not None:
            steps.add(f"{path}.{held}" if path else held)

    def unwrap(name: str) -> str:
        parts = name.split(".")
        paths = (".".join(parts[: depth + 1]) for depth in range(len(parts)))
        return ".".join(part for part, path in zip(parts, paths, strict=True) if path not in steps)

    return unwrap if steps else str


def named_modules(root: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield every module under its name in `root` without wrappers; wrappers have that of what they wrap."""
    unwrap = unwrapping(root)
    for path, module in root.named_modules():
        yield unwrap(path), module
