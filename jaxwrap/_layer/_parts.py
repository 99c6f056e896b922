"""What belongs to one layer object: its engine and its calls, bound again for a copy that NNX makes."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any

import keras

from jaxwrap._bridge import get_bridge
from jaxwrap._layer._calls import Calls
from jaxwrap._layer._engine import Engine

# With `KERAS_NNX_ENABLED`, `nnx.split` walks the attributes of a layer, and `nnx.merge` makes a new object of them:
#
#   layer ──▶ __dict__: _parts, variables ...        merged ──▶ __dict__: the same _parts, variables of its own
#      └────▶ slot _bound: these parts                  └─────▶ slot _bound: empty, until somebody asks
#
# So what knows the layer or its variables is in a slot, which NNX does not see. `nnx.jit` writes attributes of the
# merged layer back to the first one, and compiles again if they are others, so nothing may be put there.


class Parts:
    """The parts of one layer object.

    Attributes:
        layer: The layer.
        engine: Its engine.
        calls: Its calls.
        enter: Its `__call__`.
    """

    def __init__(self, layer: Any, engine: Engine, base: type):
        """Take the engine of the layer, and the class whose `call` a subclass may override."""
        self.layer = layer
        self.engine = engine
        self.calls = Calls(layer, engine, base)
        self._base = base
        # AutoGraph would rewrite the Python code below, and `torch.compile` trace it.
        keras_call = super(base, layer).__call__  # type: ignore[misc]
        self.enter = get_bridge().opaque(functools.partial(self.calls.enter, keras_call))

    def attach(self) -> None:
        """Set them on the layer, past Keras, whose constructor has not run yet."""
        object.__setattr__(self.layer, "_parts", self)
        object.__setattr__(self.layer, "_bound", self)

    def copied_to(self, layer: Any) -> Parts:
        """Return the parts of a layer that NNX has made of this one, with its variables."""
        pairs = zip(_variables(self.layer), _variables(layer), strict=True)
        found = {id(old): new for old, new in pairs}
        engine = self.engine.copied_to(layer, lambda variable: found.get(id(variable), variable))
        return Parts(layer, engine, self._base)


class HasParts:
    """A layer with a slot for its parts. NNX allows its own classes no slots."""

    __slots__ = ("_bound",)


def parts_of(layer: Any) -> Parts:
    """Return the parts of a layer. Those of a copy are made when first asked for."""
    try:
        return layer._bound
    except AttributeError:
        parts = layer._parts.copied_to(layer)
        object.__setattr__(layer, "_bound", parts)
        return parts


def _variables(layer: Any) -> list[keras.Variable]:
    # The lists of Keras's tracker, which NNX walks, and the seeds, which it does not find in their generators.
    return [*layer._trainable_variables, *layer._non_trainable_variables, *layer._seed_states]


class SignedCall:
    """A method `call` whose signature is that of the model. Keras learns from it what a layer takes."""

    def __init__(self, method: Callable[..., Any]):
        self._method = method

    def __get__(self, layer: Any, owner: type | None = None) -> Callable[..., Any]:
        if layer is None:
            return self._method
        return parts_of(layer).calls.signed or types.MethodType(self._method, layer)
