"""Means of what a layer measures while it is called, reported by the model."""

from __future__ import annotations

import re
from typing import Any

import jax.numpy as jnp
import keras
from jax.core import Tracer

from jaxwrap._typing import Tensor


class RunningMean:
    """A mean over calls, kept in two non-trainable variables of the layer.

    A Keras metric has variables of its own. But in a training step on JAX, Keras drops what a layer assigns to those,
    and keeps what it assigns to its non-trainable variables.

    Attributes:
        variables: The sum and the count.
        metric: The Keras metric that reads them.
    """

    def __init__(self, layer: keras.layers.Layer, name: str):
        with (
            keras.name_scope(layer.name, caller=layer),
            keras.name_scope("metrics"),
            keras.name_scope(re.sub(r"[^A-Za-z0-9_-]", "_", name)),
        ):
            self.variables = tuple(
                keras.Variable("zeros", (), "float32", trainable=False, autocast=False, name=part)
                for part in ("total", "count")
            )
        self.metric = _Reader(f"{layer.name}/{name}", self.variables)

    def update(self, value: Tensor) -> None:
        """Adds a value, a scalar tensor."""
        total, count = self.variables
        total.assign(total.value + keras.ops.cast(value, "float32"))
        count.assign(count.value + 1)


class _Reader(keras.metrics.Metric):
    """A metric whose result is the quotient of two variables that are not its own."""

    _read: tuple[keras.Variable, ...]

    def __init__(self, name: str, variables: tuple[keras.Variable, ...]):
        super().__init__(name=name)
        # Past Keras, which would make them the metric's own.
        object.__setattr__(self, "_read", variables)

    def update_state(self, *args: Any, **kwargs: Any) -> None:
        """The layer updates the variables when it is called."""

    def result(self) -> Tensor:
        """The mean since the last reset.

        In a compiled step on JAX Keras holds the new values of a layer's variables out of reach of metrics, and the
        old ones would be taken for constants. There the result is NaN; at the end of an epoch Keras asks again.
        """
        if isinstance(jnp.zeros(()), Tracer):
            return jnp.nan
        total, count = self._read
        return keras.ops.divide_no_nan(total.value, count.value)

    def reset_state(self) -> None:
        """Starts anew."""
        for variable in self._read:
            variable.assign(0.0)
