"""The modules inside a layer, as `model.summary(expand_nested=True)` shows them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import keras


class Module:
    """The weights of one module of a model, as Keras's summary reads layers. It is not a layer.

    Attributes:
        name: The last name in the path of the module.
        layers: The modules inside.
        weights: The variables of the module and of those inside.
    """

    built = True
    # Keras knows outputs by them, and shows "?" where there are none.
    _inbound_nodes: Sequence[Any] = ()
    _build_shapes_dict = None

    def __init__(self, name: str, items: Iterable[tuple[Sequence[str], keras.Variable]]):
        items = list(items)
        self.name = name
        self.weights = tuple(variable for _, variable in items)
        self.layers = modules(items)

    @property
    def trainable(self) -> bool:
        """Whether any weight is trained."""
        return any(variable.trainable for variable in self.weights)

    def count_params(self) -> int:
        """Return the number of elements of all weights."""
        return sum(math.prod(variable.shape) for variable in self.weights)


def modules(items: Iterable[tuple[Sequence[str], keras.Variable]]) -> tuple[Module, ...]:
    """Return the outermost modules of weights, each with those inside.

    Args:
        items: For each variable the names of the modules that it is in, outermost first.
    """
    groups: dict[str, list[tuple[Sequence[str], keras.Variable]]] = {}
    for names, variable in items:
        if names:
            groups.setdefault(names[0], []).append((names[1:], variable))
    return tuple(Module(name, group) for name, group in groups.items())


class Modules:
    """The attribute `layers` of a layer: the modules inside, which Keras reads for its summary and for nothing else.

    A class with an attribute of its own by this name keeps it, since this is not a data descriptor.
    """

    def __get__(self, layer: Any, owner: Any = None) -> Any:
        """Return the modules. The first name of a path is its collection, the last one the leaf."""
        if layer is None:
            return self
        weights = layer._engine.weights
        if weights is None:
            return ()
        leaves = [(leaf.path.split("/")[1:-1], leaf.variables) for leaf in weights.leaves]
        return modules((names, v) for names, variables in leaves for v in variables)
