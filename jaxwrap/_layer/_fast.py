"""Calls that skip what Keras does around a layer's `call`.

Keras prepares each call for what may be there: casts, masks, symbolic tensors, an unbuilt layer, layouts,
regularizers. For a small model that takes as long as the model itself. After one call of a kind has gone the whole
way and needed nothing of it, the next one only has to look at the context. This module does so.
This mirrors `Layer.__call__` by its private names, so it is used only on versions of Keras whose source has been read.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, NoReturn

import keras
from keras.src import backend
from keras.src.backend.common.global_state import get_global_attribute
from keras.src.backend.common.stateless_scope import in_stateless_scope
from keras.src.utils import traceback_utils

from jaxwrap._bridge import get_bridge

# SHA-256 of the source of `Layer.__call__` and `Operation.__call__`, by version. A test compares the installed one.
READ_SOURCES = {"3.15.1": "7134634f25fa82bb7a462c559835af3baa13d527466bdd92a60d3da76665590a"}
_IS_READ = keras.__version__ in READ_SOURCES


class Route(NamedTuple):
    """The settings of a layer when a call of some kind went the whole way. A change of one closes the short way."""

    policy: Any
    autocast: bool
    call: Any

    @classmethod
    def of(cls, layer: Any) -> Route:
        """Read it from the layer."""
        return cls(layer.dtype_policy, layer.autocast, vars(layer).get("call"))


def learn(
    layer: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], leaves: Iterable[Any]
) -> Route | None:
    """Return the short way for calls of this kind, after one has gone the whole way, or None."""
    if (
        _IS_READ
        and len(args) == 1
        and not set(kwargs) - {"training"}
        and not layer._remat_mode
        and layer.quantization_mode is None
        and all(_goes_uncast(leaf, layer) for leaf in leaves if not isinstance(leaf, (bool, int)))
    ):
        return Route.of(layer)
    return None


def is_open(route: Route, layer: Any, leaves: Iterable[Any]) -> bool:
    """Whether a call may take the short way now."""
    if (
        # Written out, since `Route.of` would take a good part of the time that is saved.
        route != (layer.dtype_policy, layer.autocast, layer.__dict__.get("call"))
        or layer.activity_regularizer is not None
        or layer.input_spec is not None
        or in_stateless_scope()
        or get_global_attribute("distribution") is not None
    ):
        return False
    # A loop takes half of the time of `all`.
    for leaf in leaves:  # noqa: SIM110
        # Not the attribute: on NumPy, Keras keeps masks in a table of its own.
        if backend.get_keras_mask(leaf) is not None:
            return False
    return True


def enter(layer: Any, training: bool | None) -> bool:
    """Begin a call as Keras does: an outermost call forgets the losses of the last one.

    Returns:
        The train flag: the caller's, or that of the call around this one.
    """
    if layer._losses and get_global_attribute("current_call_ctx") is None:
        layer._clear_losses()
    return bool(training_around() if training is None else training)


def training_around() -> bool | None:
    """Return the train flag of the Keras call around this one, or None."""
    context = get_global_attribute("current_call_ctx")
    return None if context is None else context.get_value("training")


def raise_as_keras(
    error: Exception, layer: Any, signature: Any, args: tuple[Any, ...], training: bool
) -> NoReturn:
    """Raise an error with the arguments of the call in its message, as Keras does on the whole way."""

    def fail(*args: Any, **kwargs: Any) -> Any:
        raise error

    # Keras binds the arguments to it, to print them.
    fail.__signature__ = signature  # type: ignore[attr-defined]
    name = f"{type(layer).__name__}.call()"
    traceback_utils.inject_argument_info_in_traceback(fail, name)(*args, training=training)
    raise error


def _goes_uncast(leaf: Any, layer: Any) -> bool:
    """Whether a leaf is a tensor with data whose dtype Keras leaves as it is."""
    if not get_bridge().is_concrete(leaf):
        return False
    dtype = keras.backend.standardize_dtype(leaf.dtype)
    return (
        not layer.autocast or not keras.backend.is_float_dtype(dtype) or dtype == layer.input_dtype
    )
