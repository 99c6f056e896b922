"""Metrics that a model reports from inside a layer, as running means."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection
from typing import Any

import jax.numpy as jnp
import keras
from jax.core import Tracer

from jaxwrap._typing import Tensor
from jaxwrap._weights._names import clean


class RunningMean:
    """A mean over calls, kept in two non-trainable variables of the layer.

    A Keras metric has variables of its own. But in a training step on JAX, Keras drops what a layer assigns to those,
    and keeps what it assigns to its non-trainable variables.

    Attributes:
        variables: The sum and the count.
        metric: The Keras metric that reads them.
    """

    def __init__(self, layer: keras.layers.Layer, name: str):
        # Nested scopes, as a name may hold neither `/` (Keras) nor `.` (PyTorch).
        with (
            keras.name_scope(layer.name, caller=layer),
            keras.name_scope("metrics"),
            keras.name_scope(clean(name)),
        ):
            self.variables = tuple(
                # Under mixed precision a cast total would stop growing.
                keras.Variable(
                    "zeros",
                    (),
                    "float32",
                    trainable=False,
                    autocast=False,
                    aggregation="mean",  # of the replicas of a `tf.distribute` strategy
                    name=part,
                )
                for part in ("total", "count")
            )
        self.metric = _Reader(f"{layer.name}/{name}", self.variables)

    def copied(self, find: Callable[[keras.Variable], keras.Variable]) -> RunningMean:
        """Return a mean in the variables that `find` returns, read by the same metric."""
        other = copy.copy(self)
        other.variables = tuple(map(find, self.variables))
        return other

    def update(self, value: Tensor) -> None:
        """Add a value, a scalar tensor."""
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
        """Do nothing: the layer updates the variables when it is called."""

    def result(self) -> Tensor:
        """Return the mean since the last reset.

        In a compiled step on JAX, metrics cannot reach the new values of a layer's variables, and JAX would take the
        old ones for constants. There the result is NaN. At the end of an epoch Keras asks again.
        """
        if isinstance(jnp.zeros(()), Tracer):
            return jnp.nan
        total, count = self._read
        return keras.ops.divide_no_nan(total.value, count.value)

    def reset_state(self) -> None:
        """Set sum and count to zero."""
        for variable in self._read:
            variable.assign(0.0)


class Reports:
    """The running means of a layer, made when they are first asked for.

    Only a trace of the model tells the names of its metrics, and a trace may take longer than all else of building.

    Args:
        layer: The layer.
        trace: Traces the model in training, and returns the names.
    """

    def __init__(self, layer: keras.layers.Layer, trace: Callable[[], Collection[str]]):
        self._layer = layer
        self._trace = trace
        self._means: dict[str, RunningMean] | None = None
        self._failure: Exception | None = None

    def copied_to(
        self, layer: keras.layers.Layer, find: Callable[[keras.Variable], keras.Variable]
    ) -> Reports:
        """Return the means of another layer object, with the variables that `find` returns."""
        other = copy.copy(self)
        other._layer = layer
        if self._means is not None:
            other._means = {name: mean.copied(find) for name, mean in self._means.items()}
        return other

    def means(self) -> dict[str, RunningMean]:
        """Return the means by name. After a trace that fails, the next call traces again."""
        if self._means is not None:
            return self._means
        try:
            names = self._trace()
        except Exception as error:
            # The layer may be built for other inputs than it is called with. The call raises what is wrong.
            self._failure = error
            return {}
        means = {name: RunningMean(self._layer, name) for name in names}
        self._means, self._failure = means, None
        if means:
            self._track(means)
        return means

    def _track(self, means: dict[str, RunningMean]) -> None:
        layer: Any = self._layer
        # Keras locks it after `build`. Only a trace knows the names, and comes later.
        layer._tracker.unlock()
        layer.tracked_means = [variable for mean in means.values() for variable in mean.variables]
        layer.tracked_metrics = [mean.metric for mean in means.values()]
        layer._lock_state()

    def check(self, names: Collection[str]) -> None:
        """Raise ValueError if the model reports a metric that it did not report when it was traced."""
        unknown = [name for name in names if name not in self.means()]
        if not unknown:
            return
        if self._failure is not None:
            raise ValueError(
                f"the model reports the metric {unknown[0]!r}, but there is no variable for it: tracing the model in "
                "training, for the arguments that the layer was built for, failed with "
                f"{type(self._failure).__name__}: {self._failure}"
            ) from self._failure
        raise ValueError(
            f"the model reports the metric {unknown[0]!r}, which it did not report in training for the arguments that "
            "the layer was built for. Report the same metrics in every call."
        )
