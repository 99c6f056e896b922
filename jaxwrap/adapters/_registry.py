"""Which layer is for which object."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from typing import Any

import keras

from jaxwrap._layer import JaxLayer
from jaxwrap.adapters._equinox import EquinoxLayer
from jaxwrap.adapters._haiku import HaikuLayer
from jaxwrap.adapters._linen import FlaxLayer
from jaxwrap.adapters._nnx import NNXLayer

Match = Callable[[Any], bool]


def _is_a(library: str, *names: str) -> Match:
    """Whether an object is of one of these classes of a library, which is not imported for the purpose."""

    def match(obj: Any) -> bool:
        module = sys.modules.get(library)
        return module is not None and isinstance(obj, tuple(getattr(module, n) for n in names))

    return match


def _is_pair(obj: Any) -> bool:
    return type(obj) is tuple and len(obj) == 2 and all(map(callable, obj))


def _from_pair(pair: tuple[Callable[..., Any], Callable[..., Any]], **kwargs: Any) -> JaxLayer:
    init_fn, call_fn = pair
    return JaxLayer(call_fn, init_fn, **kwargs)


# What it is called, whether an object is one, what makes a layer of it. Later ones are asked first.
_ADAPTERS: list[tuple[str, Match, Callable[..., keras.layers.Layer]]] = [
    ("a function: JaxLayer", inspect.isroutine, JaxLayer),
    ("a pair (init_fn, call_fn): JaxLayer", _is_pair, _from_pair),
    ("an Equinox module: EquinoxLayer", _is_a("equinox", "Module"), EquinoxLayer),
    (
        "a Haiku transform: HaikuLayer",
        _is_a(
            "haiku",
            "Transformed",
            "TransformedWithState",
            "MultiTransformed",
            "MultiTransformedWithState",
        ),
        HaikuLayer,
    ),
    ("a Flax NNX module: NNXLayer", _is_a("flax.nnx", "Module"), NNXLayer),
    ("a Flax Linen module: FlaxLayer", _is_a("flax.linen", "Module"), FlaxLayer),
]


def register_adapter(match: Match, layer_class: Callable[..., keras.layers.Layer]) -> None:
    """Teaches `wrap` another kind of object.

    Args:
        match: Says whether an object is of that kind. Adapters registered later are asked first.
        layer_class: Called with the object, and with the keyword arguments of `wrap`; returns a Keras layer.

    Raises:
        TypeError: If one of them cannot be called.

    Example:
        >>> import jaxwrap, numpy as np
        >>> class Shift:
        ...     shift_by = 3
        >>> def shift_layer(shift, **kwargs):
        ...     return jaxwrap.JaxLayer(lambda inputs: inputs + shift.shift_by, **kwargs)
        >>> jaxwrap.register_adapter(lambda obj: hasattr(obj, "shift_by"), shift_layer)
        >>> float(jaxwrap.wrap(Shift())(np.ones(1, "float32"))[0])
        4.0
    """
    if not callable(match) or not callable(layer_class):
        raise TypeError(
            f"register_adapter: expected a function of an object and a layer class; received {match!r} and "
            f"{layer_class!r}."
        )
    _ADAPTERS.append((getattr(layer_class, "__name__", repr(layer_class)), match, layer_class))


def wrap(obj: Any, **kwargs: Any) -> keras.layers.Layer:
    """Makes a Keras layer of a module or a function of any library that has an adapter.

    Args:
        obj: A Flax Linen or NNX module, a Haiku transform, an Equinox module, a pair `(init_fn, call_fn)`, a function,
            what an adapter has been registered for, or a Keras layer, which comes back as it is.
        **kwargs: What the layer's constructor takes.

    Raises:
        TypeError: For an object that no adapter is for, or a Keras layer with keyword arguments.

    Example:
        >>> import flax.linen as nn, jaxwrap
        >>> type(jaxwrap.wrap(nn.Dense(3), name="dense")).__name__
        'FlaxLayer'
    """
    if isinstance(obj, keras.layers.Layer):
        if kwargs:
            raise TypeError(
                f"wrap: {obj.name!r} is a Keras layer already, and takes no {', '.join(kwargs)} any more."
            )
        return obj
    for _, match, layer_class in reversed(_ADAPTERS):
        if match(obj):
            return layer_class(obj, **kwargs)
    known = "\n".join(f"  {name}" for name, _, _ in reversed(_ADAPTERS))
    raise TypeError(
        f"wrap: there is no adapter for {obj!r}, a {type(obj).__name__}. There are:\n{known}\nTo add one, turn the "
        "object into the pure functions of a JaxLayer:\n"
        "  def my_layer(obj, **kwargs):\n"
        "      def init(rng, inputs):\n"
        "          return obj.init(rng, inputs)\n"
        "      def call(params, inputs):\n"
        "          return obj.apply(params, inputs)\n"
        "      return jaxwrap.JaxLayer(call, init, **kwargs)\n"
        "  jaxwrap.register_adapter(lambda obj: isinstance(obj, MyModule), my_layer)"
    )
