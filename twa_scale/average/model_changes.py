"""Finds changes of a model since attach: replaced, frozen and added parameters."""

from collections.abc import Collection

from torch import nn

from twa_scale.base.names import quoted
from twa_scale.base.notices import notice
from twa_scale.engines.parameters import named_parameters, was_replaced
from twa_scale.errors import EngineError


class ModelChanges:
    """Finds changes of a model that would make a step of its average wrong. One check takes far less than a step.

    Args:
        module: the model.
        trained: the names of the parameters that the average trains.
    """

    def __init__(self, module: nn.Module, trained: Collection[str]) -> None:
        self._module = module
        parameters, _ = named_parameters(module)
        self._trained = {name: parameter for name, parameter in parameters.items() if name in trained}
        self._frozen = {name: parameter for name, parameter in parameters.items() if not parameter.requires_grad}
        self._known = {id(parameter) for parameter in parameters.values()}
        self._record()

    def check(self) -> None:
        """Check that no trained parameter was replaced or frozen, and report once those that became trainable.

        Raises:
            EngineError: a parameter or its module was replaced, or the parameter was frozen. The message names it.
        """
        if self._tree_changed():
            self._check_parameters()
            self._record()
        for name, parameter in self._trained.items():
            if not parameter.requires_grad:
                raise EngineError(
                    f"parameter {name!r} no longer requires a gradient, so its part of the gradient is missing, but "
                    "the step would change it. Freeze parameters before attach, or name them in `exclude`."
                )
        if unfrozen := [name for name, parameter in self._frozen.items() if parameter.requires_grad]:
            self._frozen = {}
            notice(
                f"{quoted(unfrozen)} did not require a gradient at attach, so the average does not train it. Set "
                "requires_grad before attach."
            )

    def _record(self) -> None:
        modules = list(self._module.modules())
        self._children = [(module, key, child) for module in modules for key, child in module._modules.items()]
        self._counts = [(module, len(module._modules), len(module._parameters)) for module in modules]

    def _tree_changed(self) -> bool:
        """Return whether a module was replaced, or children or parameters of a module were added or removed."""
        return any(module._modules.get(key) is not child for module, key, child in self._children) or any(
            len(module._modules) != children or len(module._parameters) != parameters
            for module, children, parameters in self._counts
        )

    def _check_parameters(self) -> None:
        """Check that the model has the trained parameters, and report added ones."""
        current, _ = named_parameters(self._module)
        current_ids = {id(parameter) for parameter in current.values()}
        if gone := [name for name, parameter in self._trained.items() if id(parameter) not in current_ids]:
            raise was_replaced(gone[0])
        new = [
            name for name, parameter in current.items() if parameter.requires_grad and id(parameter) not in self._known
        ]
        self._known |= current_ids
        if new:
            notice(f"the average does not train parameters that were added since attach: {quoted(new)}. Attach again.")
