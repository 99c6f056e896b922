"""`JaxMetric`."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import keras

from jaxwrap._function import PytreeFunction
from jaxwrap._predictions import PairFunction, predictions_first
from jaxwrap._serialization import deserialize, serialize_callable
from jaxwrap._state import State
from jaxwrap._typing import PyTree
from jaxwrap._variables import assign

_FUNCTIONS = ("fn", "init", "update", "compute")


@keras.saving.register_keras_serializable(package="jaxwrap")
class JaxMetric(keras.metrics.Metric):
    """Pure JAX functions as a Keras metric, on every backend.

    It is made of one function, whose mean over all examples it is; or of three, which make, update and read a state.

    Args:
        fn: A function of labels and predictions that returns a number for each example. Which argument is which is told
            by their names, as for `JaxLoss`. Sample weights and masks weight the mean.
        init: Makes the first state, a pytree of arrays; takes no arguments.
        update: Takes the state, labels and predictions, and returns the next state, of the same structure and shapes.
            If it has an argument `sample_weight`, it is given the sample weights too, or None.
        compute: Takes the state and returns the result: a scalar, or a dict of scalars.
        name: The name of the metric; by default that of the function.
        dtype: The dtype of the mean; by default `keras.config.floatx()`. A state keeps its own.

    Raises:
        TypeError: If neither `fn` nor all of `init`, `update` and `compute` are given, or both, or one is no function
            of these arguments.

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
        given = (init, update, compute)
        if (fn is None) == (None in given) or (fn is not None and any(given)):
            names = [
                name for name, f in zip(_FUNCTIONS, (fn, *given), strict=True) if f is not None
            ]
            raise TypeError(
                f"{self._owner}: expected `fn` alone, or `init`, `update` and `compute`; received "
                f"{', '.join(names) or 'none of them'}."
            )
        self._functions = (fn, *given)
        if fn is not None:
            self._mean = keras.metrics.MeanMetricWrapper(
                PairFunction(fn, self._owner), "mean", self._dtype_policy
            )
            return
        self._mean = None
        swapped = predictions_first(update, self._owner, ("state",))
        self._weighted = "sample_weight" in inspect.signature(update).parameters  # pyright: ignore[reportArgumentType]
        self._state = State(self, "state", init)  # pyright: ignore[reportArgumentType]
        self._own_variables = self._state.variables

        def updated(_: PyTree, given: PyTree, old: PyTree) -> tuple[PyTree, PyTree]:
            y_true, y_pred, weights = given
            pair = (y_pred, y_true) if swapped else (y_true, y_pred)
            new = update(self._state.decode(old), *pair, **weights)  # pyright: ignore[reportOptionalCall]
            problem = f"{self._owner}: `update` has changed the structure of the state."
            return (), self._state.encode(new, problem)

        def computed(_: PyTree, __: PyTree, old: PyTree) -> tuple[PyTree, PyTree]:
            return (), compute(self._state.decode(old))  # pyright: ignore[reportOptionalCall]

        self._update = PytreeFunction(updated, self._owner)
        self._compute = PytreeFunction(computed, self._owner)

    def update_state(self, y_true: PyTree, y_pred: PyTree, sample_weight: Any = None) -> None:
        """Adds a batch.

        Raises:
            ValueError: If sample weights are given, and `update` takes none; or if it returns another state.
        """
        if self._mean is not None:
            self._mean.update_state(y_true, y_pred, sample_weight)
            return
        if sample_weight is not None and not self._weighted:
            raise ValueError(
                f"{self._owner}: received sample weights, but `update` has no argument `sample_weight`. Give it one, "
                "or pass the metric as `metrics`, not as `weighted_metrics`."
            )
        weights = {"sample_weight": sample_weight} if self._weighted else {}
        old = [variable.value for variable in self._own_variables]
        _, new = self._update((), (y_true, y_pred, weights), old)
        for variable, value in zip(self._own_variables, new, strict=True):
            variable.assign(value)

    def result(self) -> Any:
        """The mean, or what `compute` returns."""
        if self._mean is not None:
            return self._mean.result()
        return self._compute((), (), [variable.value for variable in self._own_variables])[1]

    def reset_state(self) -> None:
        """Starts anew."""
        if self._mean is not None:
            self._mean.reset_state()
            return
        for variable, value in zip(self._own_variables, self._state.initial, strict=True):
            assign(variable, value)

    def get_config(self) -> dict[str, Any]:
        """The configuration, of data and registered names.

        Raises:
            TypeError: If a function cannot be saved. The error says what to do.
        """
        functions = {
            name: serialize_callable(fn, name, self._owner)
            for name, fn in zip(_FUNCTIONS, self._functions, strict=True)
            if fn is not None
        }
        return {**super().get_config(), **functions}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> JaxMetric:
        """The inverse of `get_config`. Resolves only names that are registered, or listed.

        Raises:
            ValueError: For a config that `get_config` cannot have made, or a name that is not known.
        """
        owner = f"{cls.__name__} {config.get('name')!r}"
        functions = {
            name: deserialize(config[name], name, owner) for name in _FUNCTIONS if name in config
        }
        return cls(**{**config, **functions})

    @property
    def _owner(self) -> str:
        return f"{type(self).__name__} {self.name!r}"


def _name_of(fn: Any) -> str | None:
    name = getattr(getattr(fn, "func", fn), "__name__", None)
    return name if name and name.isidentifier() else None
