"""`JaxMetric`."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import jax
import keras

from jaxwrap._bridge import get_bridge
from jaxwrap._errors import describe, door, naming
from jaxwrap._function import PytreeFunction
from jaxwrap._serialization import deserialize, one_config, serialize_callable
from jaxwrap._training._predictions import PairFunction, predictions_first
from jaxwrap._training._printing import name_of
from jaxwrap._typing import PyTree
from jaxwrap._weights._state import State
from jaxwrap._weights._variables import assign, to_host

_FUNCTIONS = ("fn", "init", "update", "compute")


@keras.saving.register_keras_serializable(package="jaxwrap")
class JaxMetric(keras.metrics.Metric):
    """Pure JAX functions as a Keras metric, on every backend.

    One function gives the mean over all examples. Three functions make, update and read a state.

    Args:
        fn: A function of labels and predictions that returns a number for each example. The names of its arguments say
            which is which, as for `JaxLoss`. Sample weights and masks weight the mean.
        init: Makes the first state, a pytree of arrays. It does not take arguments.
        update: Takes the state, labels and predictions, and returns the next state, of the same structure and shapes.
            If it has an argument `sample_weight`, it gets the sample weights too, or None.
        compute: Takes the state and returns the result: a scalar, or a dict of scalars.
        name: The name of the metric. By default that of the function.
        dtype: The dtype of the mean. By default `keras.config.floatx()`. A state keeps its own.

    Raises:
        TypeError: Unless either `fn` or all of `init`, `update` and `compute` are functions of these arguments.

    Example:
        >>> import jax.numpy as jnp, numpy as np, jaxwrap
        >>> metric = jaxwrap.JaxMetric(
        ...     init=lambda: {"worst": jnp.zeros(())},
        ...     update=lambda state, y_true, y_pred: {
        ...         "worst": jnp.maximum(state["worst"], jnp.abs(y_true - y_pred).max())
        ...     },
        ...     compute=lambda state: state["worst"],
        ...     name="worst",
        ... )
        >>> metric.update_state(np.array([1.0, 2.0]), np.array([1.5, 5.0]))
        >>> float(metric.result())
        3.0
    """

    def __init__(
        self,
        fn: Callable[..., Any] | None = None,
        *,
        init: Callable[[], PyTree] | None = None,
        update: Callable[..., PyTree] | None = None,
        compute: Callable[[PyTree], Any] | None = None,
        name: str | None = None,
        dtype: Any = None,
    ):
        super().__init__(name=name or _name_of(fn or update), dtype=dtype)
        self._functions = (fn, init, update, compute)
        with naming(describe(self)):
            _check_functions(self._functions)
            self._mean = self._stateful = None
            if fn is not None:
                pair = PairFunction(fn)
                # Keras's own, for its sample weights and masks.
                self._mean = keras.metrics.MeanMetricWrapper(pair, "mean", self._dtype_policy)
            else:
                self._stateful = _Stateful(self, init, update, compute)
                self._state_variables = self._stateful.variables  # Keras tracks them here

    @door
    def update_state(self, y_true: PyTree, y_pred: PyTree, sample_weight: Any = None) -> None:
        """Add a batch.

        Raises:
            ValueError: If there are sample weights, and `update` does not take them, or if it returns another state.
        """
        part: Any = self._mean or self._stateful
        part.update_state(y_true, y_pred, sample_weight)

    @door
    def result(self) -> Any:
        """Return the mean, or the result of `compute`."""
        part: Any = self._mean or self._stateful
        return part.result()

    def reset_state(self) -> None:
        """Go back to the first state."""
        part: Any = self._mean or self._stateful
        part.reset_state()

    def get_config(self) -> dict[str, Any]:
        """Return the configuration as JSON, with registered names.

        Raises:
            TypeError: If a function cannot be saved. The error names the fix.
        """
        with naming(describe(self)), one_config("metric", describe(self)):
            functions = {
                name: serialize_callable(fn, name)
                for name, fn in zip(_FUNCTIONS, self._functions, strict=True)
                if fn is not None
            }
        return {**super().get_config(), **functions}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> JaxMetric:
        """Make a metric from the result of `get_config`. Resolve only registered or allowed names.

        Raises:
            ValueError: If the config has a name that is not registered, or `get_config` cannot have returned it.
        """
        with naming(f"{cls.__name__} {config.get('name')!r}"):
            functions = {
                name: deserialize(config[name], name) for name in _FUNCTIONS if name in config
            }
        return cls(**{**config, **functions})

    def __repr__(self) -> str:
        fn = next(fn for fn in (self._functions[0], self._functions[2]) if fn is not None)
        return f"<{describe(self)}: {name_of(fn)}>"


class _Stateful:
    """A metric that three functions make, update and read.

    Attributes:
        variables: The variables of the state.
    """

    def __init__(self, owner: Any, init: Any, update: Any, compute: Any):
        swapped = predictions_first(update, ("state",))
        self._takes_weights = "sample_weight" in inspect.signature(update).parameters
        self._state = State(owner, "state", init)
        self.variables = self._state.variables
        # Copies on the host: on JAX, `fit` donates and deletes the buffers of variables.
        self._initial = [to_host(variable) for variable in self.variables]

        def updated(_: PyTree, batch: PyTree, old: PyTree) -> tuple[PyTree, PyTree]:
            y_true, y_pred, weights = batch
            pair = (y_pred, y_true) if swapped else (y_true, y_pred)
            new = update(self._state.decode(old), *pair, **weights)
            return (), self._state.encode(new, "`update` has changed the structure of the state.")

        def computed(_: PyTree, __: PyTree, old: PyTree) -> tuple[PyTree, PyTree]:
            return (), compute(self._state.decode(old))

        self._update = PytreeFunction(updated)
        self._compute = PytreeFunction(computed)

    def update_state(self, y_true: PyTree, y_pred: PyTree, sample_weight: Any) -> None:
        """Assign the state after one more batch."""
        if sample_weight is not None and not self._takes_weights:
            raise ValueError(
                "received sample weights, but `update` does not have an argument `sample_weight`. Add it, or pass the "
                "metric as `metrics`, not as `weighted_metrics`."
            )
        weights = {"sample_weight": sample_weight} if self._takes_weights else {}
        # No rule makes one state of those of several replicas. So all of them see the whole batch.
        if get_bridge().is_replica():
            batch = (y_true, y_pred, weights)
            y_true, y_pred, weights = jax.tree.map(get_bridge().gathered, batch)
        # All read before any is assigned.
        old = [variable.value for variable in self.variables]
        _, new = self._update((), (y_true, y_pred, weights), old)
        for variable, value in zip(self.variables, new, strict=True):
            variable.assign(value)

    def result(self) -> Any:
        """Return the result of `compute`."""
        return self._compute((), (), [variable.value for variable in self.variables])[1]

    def reset_state(self) -> None:
        """Assign the first state."""
        for variable, value in zip(self.variables, self._initial, strict=True):
            assign(variable, value)


def _check_functions(functions: tuple[Any, ...]) -> None:
    fn, *others = functions
    if (fn is None) == (None in others) or (fn is not None and any(others)):
        names = [name for name, f in zip(_FUNCTIONS, functions, strict=True) if f is not None]
        raise TypeError(
            "expected `fn` alone, or `init`, `update` and `compute`; received "
            f"{', '.join(names) or 'no function'}."
        )


def _name_of(fn: Any) -> str | None:
    name = getattr(getattr(fn, "func", fn), "__name__", None)
    return name if name and name.isidentifier() else None
