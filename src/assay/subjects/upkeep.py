"""What may change in a module after it was loaded: the objects that it is made of, and its training mode."""

from __future__ import annotations

from numbers import Real
from typing import Any

from torch import nn


class Tree:
    """The modules that a module was made of at some moment.

    Args:
        module: The module.
    """

    def __init__(self, module: nn.Module) -> None:
        self.modules = list(module.modules())
        self._children = [(found._modules, tuple(found._modules.values())) for found in self.modules]

    def changed(self) -> bool:
        """Whether a module was replaced, added or removed since then, at any depth."""
        return any(tuple(now.values()) != then for now, then in self._children)

    def unsettled(self) -> nn.Module | None:
        """A module in training mode that computes something else there than in evaluation; None where there is none."""
        return next((found for found in self.modules if found.training and differs_in_training(found)), None)


def differs_in_training(module: nn.Module) -> bool:
    """Whether a module's own forward, not that of its children, depends on training mode.

    Dropout in any form (a module, or a rate that the module keeps for a function) and batch norms with running
    statistics do.

    Args:
        module: A module.

    Example:
        >>> differs_in_training(nn.Dropout(0.1)), differs_in_training(nn.Dropout(0.0)), differs_in_training(nn.ReLU())
        (True, False, False)
    """
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        return module.running_mean is not None
    if isinstance(module, nn.RReLU):
        return True
    drops = "drop" in type(module).__name__.lower() or "stochasticdepth" in type(module).__name__.lower()
    return any(
        _positive(value) for name, value in vars(module).items() if "drop" in name.lower() or (drops and name == "p")
    )


def _positive(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and float(value) > 0


def compiled(module: nn.Module) -> str | None:
    """The name of a part that torch.compile has compiled ("" for the whole module), None where there is none.

    Args:
        module: A module.
    """
    name: str
    for name, found in module.named_modules():
        if type(found).__name__ == "OptimizedModule" or getattr(found, "_compiled_call_impl", None) is not None:
            return name
    return None
