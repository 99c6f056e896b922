"""Building an optimizer, once or again with other variables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import keras

from jaxwrap._bridge import get_bridge
from jaxwrap._training._rate import value_of
from jaxwrap._training._update import Step
from jaxwrap._typing import Tensor
from jaxwrap._weights._variables import current_values, read


def make_step(optimizer: Any, variables: Sequence[keras.Variable]) -> Step:
    """Make the update of some variables, with its state.

    Raises:
        ValueError: If the transformation needs what a Keras optimizer cannot pass, inside a JAX trace, or in a step of
            one of several replicas.
    """
    if get_bridge().is_replica():
        raise ValueError(
            "the optimizer cannot be built by one of the replicas of a `tf.distribute` strategy. Call "
            "`optimizer.build(model.trainable_variables)` before, in the scope of the strategy."
        )
    recipe = optimizer._own.recipe
    # Keras itself assigns the gradients of some variables, which are then not the transformation's.
    trained = [v for v in variables if not optimizer._overwrite_variable_with_gradient(v)]
    # Keras may build an optimizer while it traces the first training step.
    with get_bridge().lifted():
        try:
            rate = optimizer._get_current_learning_rate() if recipe.takes_rate else None
            rate = None if rate is None else read(value_of(rate))
            step = Step(optimizer, trained, recipe, rate)
        except jax.errors.TracerArrayConversionError as error:
            raise ValueError(
                "the optimizer cannot be built while JAX compiles a function, since the state begins with the values "
                "of the variables. Call `optimizer.build(model.trainable_variables)` before."
            ) from error
    if optimizer.weight_decay is not None and optimizer._rate_in(step.state.tree) is None:
        raise optimizer._unknown_rate("cannot decay weights, which takes the learning rate")
    return step


def untrack(optimizer: Any) -> dict[Any, Tensor]:
    """Forget the variables of an optimizer that is to be built again. Return their values, by what they belong to."""
    keys = _keys(optimizer)
    # Keras makes its own variables again, and their places change.
    values = dict(zip(keys, current_values(keys.values()), strict=True))
    for variable in optimizer.variables:
        # The constructor of Keras made these two, and `build` does not make them again.
        if variable is not optimizer._iterations and variable is not optimizer._learning_rate:
            optimizer._untrack_variable(variable)
    optimizer._trainable_variables_indices.clear()
    return values


def restore(
    optimizer: Any, values: Mapping[Any, Tensor], variables: Sequence[keras.Variable]
) -> None:
    """Assign the values from before to the variables that stay."""
    if not values:
        return
    for key, variable in _keys(optimizer).items():
        value = values.get(key)
        if value is not None and tuple(value.shape) == tuple(variable.shape):
            variable.assign(value)
    if optimizer.use_ema:
        # The average of a new variable begins with its value.
        averages = optimizer._model_variables_moving_average
        for variable, average in zip(variables, averages, strict=True):
            if average is not None and average.path not in values:
                average.assign(variable.value)


def _keys(optimizer: Any) -> dict[Any, keras.Variable]:
    """Return the variables of an optimizer by path, or by the variable that they are about and the rest of the path."""
    step, keys = optimizer._own.step, {}
    own = set(map(id, step.state.variables))
    for variable in optimizer.variables:
        rest, index = step.params.index(tuple(variable.path.split("/")))
        # The names of variables change with the others that are trained.
        is_about_one = index >= 0 and id(variable) in own
        key = (rest, id(step.params.variables[index])) if is_about_one else variable.path
        keys[key] = variable
    return keys
