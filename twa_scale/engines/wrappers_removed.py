"""A wrapped model as it was before it was wrapped, for code that reads names and modules and no values."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import nn

from twa_scale.engines.flat_parameters import is_flat
from twa_scale.engines.module_names import unwrapped


@contextmanager
def wrappers_removed(root: nn.Module) -> Iterator[None]:
    """Take the wrappers out of the modules of `root` in a `with` block. Not collective.

    Names have no attributes of wrappers in it, and state dicts of modules gather nothing. Tensors that FSDP1 has moved
    into flat parameters (`use_orig_params=False`) are empty parameters of their modules.
    """
    with ExitStack() as undo:
        for module, name in _flattened(root):
            undo.callback(module._parameters.pop, name)
            module._parameters[name] = nn.Parameter(torch.empty(0, device="cpu"))
        for module in list(root.modules()):
            for name, child in list(module._modules.items()):
                if child is not None and (inner := unwrapped(child)) is not child:
                    undo.callback(module._modules.__setitem__, name, child)
                    module._modules[name] = inner
        yield


def _flattened(root: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """Yield the module and the name of each tensor in flat parameters of FSDP1 that took the place of the tensors."""
    for flat in list(root.parameters()):
        if is_flat(flat):
            for info in (*flat._param_infos, *flat._shared_param_infos):  # type: ignore[attr-defined]
                if hasattr(info, "param_name"):  # fairscale has other entries
                    yield info.module, info.param_name
