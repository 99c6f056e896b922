"""One update of all variables by a transformation: what is compiled, and where its state is kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import keras

from jaxwrap._function import PytreeFunction
from jaxwrap._state import State
from jaxwrap._typing import Array, PyTree, Tensor
from jaxwrap._variables import assign_all, current_values, to_host
from jaxwrap.optimizers._params import Params
from jaxwrap.optimizers._recipe import Recipe, init, needed_arguments, update


class Step:
    """The update of some variables.

    Args:
        optimizer: The optimizer; its name begins the paths of the state. It must still track `state.variables`.
        owner: What errors begin with.
        variables: The variables to train.
        recipe: How to get the transformation.
        rate: The learning rate to begin with, if the recipe takes one.

    Attributes:
        params: The variables by name.
        state: The state of the transformation.
        needed: The names of the extra arguments that the transformation needs.
    """

    def __init__(
        self,
        optimizer: keras.optimizers.Optimizer,
        owner: str,
        variables: Sequence[keras.Variable],
        recipe: Recipe,
        rate: Any,
    ):
        self.params = Params(variables)
        self._recipe = recipe
        self._owner = owner
        transformation = recipe.make(rate)
        tree = self.params.tree([to_host(variable) for variable in variables])
        self.needed = needed_arguments(transformation, tree, owner)
        seen: dict[Any, int] = {}

        def rank(path: tuple[str, ...]) -> tuple[int, int]:
            # In the order of the variables, whatever numbers Keras has put into their names.
            kind, index = self.params.index(path)
            return seen.setdefault(kind, len(seen)), index

        self.state = State(
            optimizer, "opt_state", lambda tree: init(transformation, tree), (tree,), rank
        )
        self._update = PytreeFunction(self._call, owner)

    def __call__(
        self, gradients: Sequence[Tensor | None], rate: Tensor, extra: dict[str, Any]
    ) -> None:
        """Assigns the new values of the variables, except those without a gradient, and the new state.

        Args:
            gradients: The gradients, in the order of the variables.
            rate: The learning rate, if the recipe takes one.
            extra: Extra arguments of the transformation.
        """
        variables = (self.params.variables, self.state.variables)
        old = list(map(current_values, variables))
        _, new = self._update((), (list(gradients), rate, extra), old)
        pairs = [
            (variable, value)
            for part, values in zip(variables, new, strict=True)
            for variable, value in zip(part, values, strict=True)
            if value is not None
        ]
        assign_all([variable for variable, _ in pairs], [value for _, value in pairs])

    def _call(self, _: PyTree, constant: PyTree, old: PyTree) -> tuple[PyTree, PyTree]:
        gradients, rate, extra = constant
        values = [
            jnp.asarray(value, variable.dtype)
            for value, variable in zip(old[0], self.params.variables, strict=True)
        ]
        # The transformation sees the whole tree, and so zeros for a variable that is to stay.
        given = [
            jnp.zeros_like(value) if gradient is None else jnp.asarray(gradient, value.dtype)
            for gradient, value in zip(gradients, values, strict=True)
        ]
        changes, state = update(
            self._recipe.make(rate),
            self.params.tree(given),
            self.state.decode(old[1]),
            self.params.tree(values),
            extra,
        )
        new = [
            None if gradient is None else (value + change).astype(value.dtype)
            for gradient, value, change in zip(
                gradients, values, self.params.values(changes), strict=True
            )
        ]
        problem = f"{self._owner}: the transformation has changed the structure of its state."
        return (), (new, self.state.encode(state, problem))


def tap(loss: Array, receive: Callable[[Array], Any]) -> Array:
    """The loss, which `receive` gets when it is differentiated.

    Keras differentiates the loss on JAX in a function of which the optimizer sees nothing but the gradients: what is
    kept in there means nothing outside. But residuals reach the backward pass as values of the outside.
    """

    @jax.custom_vjp
    def same(loss: Array) -> Array:
        return loss

    def backward(residual: Array, cotangent: Array) -> tuple[Array]:
        receive(residual)
        return (cotangent,)

    same.defvjp(lambda loss: (loss, loss), backward)
    return same(loss)
