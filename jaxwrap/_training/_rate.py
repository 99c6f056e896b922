"""The learning rate of an optimizer: a number, a schedule of Keras or of Optax, or in the transformation alone."""

from __future__ import annotations

from typing import Any

import keras

from jaxwrap._errors import door
from jaxwrap._serialization import deserialize, serialize
from jaxwrap._training._internals import Internals
from jaxwrap._training._printing import name_of, number_in
from jaxwrap._training._transformation import EXAMPLE, injected
from jaxwrap._weights._variables import read

__all__ = ["EXAMPLE", "RatedOptimizer", "value_of"]

_KerasSchedule = keras.optimizers.schedules.LearningRateSchedule


def _unknown() -> None:
    """Stands for a learning rate that only the transformation knows."""


def value_of(rate: Any) -> Any:
    """Return the learning rate as a tensor or a number."""
    return rate.value if isinstance(rate, keras.Variable) else rate


def _is_schedule(rate: Any) -> bool:
    # With `KERAS_NNX_ENABLED` variables are callable as well.
    return callable(rate) and not isinstance(rate, keras.Variable)


class RatedOptimizer(keras.optimizers.Optimizer):
    """An optimizer that knows its learning rate, or finds it in the state of its transformation."""

    state: Any
    _own: Internals

    def __init__(self, learning_rate: Any, **kwargs: Any):
        # Keras takes floats only.
        if isinstance(learning_rate, int):
            learning_rate = float(learning_rate)
        # For a callable, Keras makes no variable that would be saved and shown.
        super().__init__(_unknown if learning_rate is None else learning_rate, **kwargs)

    @property
    @door
    def learning_rate(self) -> Any:
        """The current learning rate, a variable, or a tensor where there is a schedule.

        It can be set to a number, a Keras schedule or an Optax schedule.

        Raises:
            ValueError: When it is read or set, if only the transformation knows it.
        """
        rate = self._get_current_learning_rate()
        if rate is None and not self._own.call.is_applying:
            raise self._unknown_rate("has no learning rate that could be read")
        return rate

    @learning_rate.setter
    @door
    def learning_rate(self, value: Any) -> None:
        current = self._learning_rate
        if current is _unknown:
            variable = self._rate_in(self.state)
            if variable is None:
                raise self._unknown_rate("has no learning rate that could be set")
            if _is_schedule(value) or self._follows_injected_schedule():
                raise ValueError(
                    f"received learning_rate={value!r}. The learning rate is a hyperparameter of the "
                    "transformation, which takes numbers only, and none if it was made with a schedule. Pass the "
                    f"function that makes the transformation, and the schedule: {EXAMPLE}."
                )
            variable.assign(value)
            return
        if _is_schedule(current) and not _is_schedule(value):
            raise TypeError(
                f"received learning_rate={value!r}, but the learning rate follows the schedule "
                f"{current!r}. Set another schedule, or make the optimizer with a number."
            )
        keras.optimizers.Optimizer.learning_rate.fset(self, value)  # pyright: ignore[reportOptionalCall]

    def _get_current_learning_rate(self) -> Any:
        return self._rate_in(self.state)

    def _rate_in(self, state: Any) -> Any:
        """Return the learning rate, with `state` for the state of the transformation, or None if it is not known."""
        rate = self._learning_rate
        if rate is _unknown:
            found = injected(state, lambda node: node.hyperparams.get("learning_rate"))
            return found[0] if len(found) == 1 else None
        if _is_schedule(rate) and not isinstance(rate, _KerasSchedule):
            return self._own.rate_at(rate, keras.ops.cast(self._iterations, "int32"))
        return super()._get_current_learning_rate()

    def _follows_injected_schedule(self) -> bool:
        def schedule(node: Any) -> Any:
            return getattr(node, "hyperparams_states", {}).get("learning_rate")

        return bool(injected(self.state, schedule))

    def _unknown_rate(self, problem: str) -> ValueError:
        return ValueError(
            f"the optimizer {problem}: only the transformation knows it. Pass the function that makes the "
            f"transformation, and the learning rate: {EXAMPLE}; or a transformation with one `learning_rate` in an "
            "`optax.inject_hyperparams`, which is known once the optimizer has been built."
        )

    def _rate_config(self) -> Any:
        rate = self._learning_rate
        if rate is _unknown:
            return None
        if isinstance(rate, _KerasSchedule):
            return keras.optimizers.schedules.serialize(rate)
        if _is_schedule(rate):
            return serialize(rate, "learning_rate")
        return float(read(value_of(rate)))

    @staticmethod
    def _rate_from_config(config: Any, custom_objects: Any) -> Any:
        if isinstance(config, dict) and "class_name" in config:
            return keras.optimizers.schedules.deserialize(config, custom_objects)
        return deserialize(config, "learning_rate")

    def _rate_for_repr(self) -> str:
        rate = self._learning_rate
        if rate is _unknown:
            rate = self._rate_in(self.state)
        if rate is None:
            return "unknown"
        if isinstance(rate, keras.Variable):
            return number_in(rate, ".4g")
        return type(rate).__name__ if isinstance(rate, _KerasSchedule) else name_of(rate)
