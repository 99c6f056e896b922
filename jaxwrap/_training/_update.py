"""One compiled update of all variables by a transformation, and the variables of its state."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import keras
from jax.core import Tracer

from jaxwrap._bridge import get_bridge
from jaxwrap._function import PytreeFunction
from jaxwrap._serialization import check_size
from jaxwrap._training._params import Params
from jaxwrap._training._transformation import Recipe, init, needed_arguments, update
from jaxwrap._typing import Array, PyTree, Tensor
from jaxwrap._weights._state import State
from jaxwrap._weights._variables import assign_all, current_values, to_host


class Step:
    """The update of some variables.

    Args:
        optimizer: The optimizer. Its name begins the paths of the state, and it must still track `state.variables`.
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
        optimizer: Any,
        variables: Sequence[keras.Variable],
        recipe: Recipe,
        rate: Any,
    ):
        self.params = Params(variables)
        self._recipe = recipe
        transformation = recipe.make(rate)
        tree = self.params.tree(_values(variables))
        if optimizer._own.is_from_file:
            # By `eval_shape`, which allocates nothing.
            check_size(jax.tree.leaves(jax.eval_shape(lambda: init(transformation, tree))))
        # Asked now, so that a transformation that Keras cannot feed fails in `build`, and not in `fit`.
        self.needed = needed_arguments(transformation, tree, self.params.top())
        seen: dict[Any, int] = {}

        def rank(path: tuple[str, ...]) -> tuple[int, int]:
            # Keras numbers names, and `dense_10` sorts before `dense_9`: keep the order of the variables instead.
            kind, index = self.params.index(path)
            return seen.setdefault(kind, len(seen)), index

        def like(path: tuple[str, ...]) -> keras.Variable | None:
            _, index = self.params.index(path)
            return None if index < 0 else self.params.variables[index]

        def first(tree: PyTree) -> PyTree:
            return init(transformation, tree)

        self.state = State(optimizer, "opt_state", first, (tree,), rank, like)
        self._update = PytreeFunction(self._call)

    def __call__(
        self, gradients: Sequence[Tensor | None], rate: Tensor, extra: dict[str, Any]
    ) -> None:
        """Assign the new values of the variables, except those without a gradient, and the new state.

        Args:
            gradients: The gradients, in the order of the variables.
            rate: The learning rate, if the recipe takes one.
            extra: Extra arguments of the transformation.
        """
        variables = (self.params.variables, self.state.variables)
        # Values, not variables: PyTorch writes in place, so all must be read before one is assigned.
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
            # A backend may hold a dtype that it does not have as another one.
            jnp.asarray(value, variable.dtype)
            for value, variable in zip(old[0], self.params.variables, strict=True)
        ]
        # The transformation takes the whole tree. A variable without a gradient has zeros in it, and stays as it is.
        filled = [
            jnp.zeros_like(value) if gradient is None else jnp.asarray(gradient, value.dtype)
            for gradient, value in zip(gradients, values, strict=True)
        ]
        changes, state = update(
            self._recipe.make(rate),
            self.params.tree(filled),
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
        problem = "the transformation has changed the structure of its state."
        return (), (new, self.state.encode(state, problem))


def _values(variables: Sequence[keras.Variable]) -> list[Any]:
    """Return the values of variables: on the host, or where they are if they are on a mesh."""
    if get_bridge().mesh() is None:
        return [to_host(variable) for variable in variables]
    values = current_values(variables)
    for value in values:
        if isinstance(value, Tracer):
            raise jax.errors.TracerArrayConversionError(value)
    return values


def tap(loss: Array, receive: Callable[[Array], Any]) -> Array:
    """Return the loss, and pass it to `receive` when it is differentiated.

    Keras differentiates the loss on JAX inside a function, and the optimizer sees only the gradients. A tracer that is
    kept inside means nothing outside. But residuals reach the backward pass as values of the outside.
    """

    @jax.custom_vjp
    def same(loss: Array) -> Array:
        return loss

    def backward(residual: Array, cotangent: Array) -> tuple[Array]:
        receive(residual)
        return (cotangent,)

    same.defvjp(lambda loss: (loss, loss), backward)
    return same(loss)


def summed_arguments(extra: dict[str, Any]) -> dict[str, Any]:
    """Return the extra arguments of a transformation for all replicas.

    Raises:
        ValueError: In a step of one of several replicas, for an argument other than `value`.
    """
    bridge = get_bridge()
    if not extra or not bridge.is_replica():
        return extra
    if others := [name for name in extra if name != "value"]:
        raise ValueError(
            f"received {', '.join(f'`{name}`' for name in others)} from one of the replicas of a `tf.distribute` "
            "strategy, and it is unknown what all of them should use. Only `value` can be passed there, the loss of a "
            "replica, which is summed as the gradients are."
        )
    return {"value": bridge.summed([extra["value"]])[0]}


def extra_arguments(extra: dict[str, Any], loss: Any, needed: Sequence[str]) -> dict[str, Any]:
    """Return the extra arguments of a transformation, with numbers as tensors.

    Args:
        extra: The arguments that the caller passes.
        loss: The loss of this step, or None.
        needed: The names of the arguments that the transformation needs.

    Raises:
        ValueError: If one of them is missing.
    """
    arguments = dict(extra)
    if "value" in needed and loss is not None:
        arguments.setdefault("value", loss)
    if missing := [name for name in needed if name not in arguments]:
        raise ValueError(
            f"this transformation needs {', '.join(f'`{name}`' for name in missing)}. Pass it in a loop or a "
            f"`train_step` of your own: `optimizer.apply(grads, variables, {missing[0]}=...)`. In `fit` the loss, "
            "`value`, is there, unless there is a LossScaleOptimizer, which does not pass it on."
        )
    numbers = (bool, int, float)
    return jax.tree.map(
        # A Python number would be compiled in.
        lambda leaf: keras.ops.convert_to_tensor(leaf) if isinstance(leaf, numbers) else leaf,
        arguments,
    )
