"""Calls for which nothing is to be done of what Keras does around a layer's `call`."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from typing import Any

import keras
from keras.src.backend.common.global_state import get_global_attribute
from keras.src.backend.common.stateless_scope import in_stateless_scope

from jaxwrap._bridge import get_bridge


class Shortcut:
    """Which calls of a layer may go straight to `call`.

    Keras prepares each call for what may be: casts, masks, symbolic tensors, an unbuilt layer, layouts, regularizers.
    For a small model that takes as long as what it computes. Where a call of the same kind has gone the whole way
    before, and none of these is there, what is left to be done is to look at the context: see `enter`.
    """

    def __init__(self):
        self._kinds: set[Hashable] = set()
        self._policy: Any = None

    def learn(
        self,
        layer: keras.layers.Layer,
        kind: Hashable,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        leaves: Iterable[Any],
    ) -> None:
        """Notes that a call of a kind has gone the whole way.

        Args:
            layer: The layer.
            kind: What is the same for calls alike: the structure of the arguments; type, dtype and rank of each.
            args: The arguments.
            kwargs: Likewise.
            leaves: Their leaves.
        """
        if self._policy is not layer.dtype_policy:
            self._policy = layer.dtype_policy
            self._kinds.clear()
        if (
            len(args) == 1
            and not set(kwargs) - {"training"}
            and not layer._remat_mode
            and layer.quantization_mode is None
            and all(
                _goes_uncast(leaf, layer) for leaf in leaves if not isinstance(leaf, (bool, int))
            )
        ):
            self._kinds.add(kind)

    def is_open(self, layer: keras.layers.Layer, kind: Hashable, leaves: Iterable[Any]) -> bool:
        """Whether a call may take the shortcut."""
        return (
            kind in self._kinds
            and layer.dtype_policy is self._policy
            and layer.activity_regularizer is None
            and layer.input_spec is None
            and not in_stateless_scope()
            and get_global_attribute("distribution") is None
            and all(getattr(leaf, "_keras_mask", None) is None for leaf in leaves)
        )


def _goes_uncast(leaf: Any, layer: keras.layers.Layer) -> bool:
    """Whether a leaf is a tensor that holds data, of a dtype that Keras would leave as it is."""
    if not get_bridge().is_concrete(leaf):
        return False
    dtype = keras.backend.standardize_dtype(leaf.dtype)
    return (
        not layer.autocast or not keras.backend.is_float_dtype(dtype) or dtype == layer.input_dtype
    )


def enter(layer: keras.layers.Layer, training: bool | None) -> bool:
    """Begins a call as Keras does: one that is part of no other forgets the losses of the last.

    Args:
        layer: The layer.
        training: The train flag that the caller gave, if any.

    Returns:
        The train flag: the one given, or that of the call that this one is part of.
    """
    context = get_global_attribute("current_call_ctx")
    if context is None and layer._losses:
        layer._clear_losses()
    if training is None and context is not None:
        training = context.get_value("training")
    return bool(training)
