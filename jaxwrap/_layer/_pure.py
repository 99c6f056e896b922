"""The inference of a layer as a pure JAX function, on every backend."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import keras

from jaxwrap._layer._layer import JaxLayer
from jaxwrap._layer._parts import parts_of
from jaxwrap._pytree import partition
from jaxwrap._typing import Array, PyTree


class PureCall(NamedTuple):
    """One kind of call of a layer.

    Attributes:
        fn: Takes the values of the variables and the arrays of the arguments, two lists. Returns the outputs, and the
            new values of variables that the call changes, by index.
        variables: The variables.
        order: The tensors of the arguments, as `fn` takes them.
    """

    fn: Callable[[list[Array], list[Array]], tuple[PyTree, dict[int, Array]]]
    variables: list[keras.Variable]
    order: list[Any]


def pure_call(
    layer: JaxLayer, args: tuple[Any, ...], kwargs: dict[str, Any], is_tensor: Callable[[Any], bool]
) -> PureCall | None:
    """Return the inference of a built layer, without what the backend does around it.

    Args:
        layer: The layer.
        args: The arguments, with anything in the place of each tensor.
        kwargs: Likewise.
        is_tensor: Whether a leaf of them stands for a tensor.

    Returns:
        None if a class of the user's overrides `call`, or the arguments say that it is a call in training.
    """
    engine = parts_of(layer).engine
    if type(layer).call is not JaxLayer.call:
        return None
    arguments, training = engine.bind(args, kwargs)
    if training:
        return None
    program = engine.built_program()
    order, structure = partition(arguments, is_tensor)
    flat, variables = program.pure(structure)

    def fn(values: list[Array], inputs: list[Array]) -> tuple[PyTree, dict[int, Array]]:
        flowing, kept, static = flat(*values, *(_cast(layer, array) for array in inputs))
        outputs, _ = static.value.flowing.unflatten(flowing)
        changed, _ = static.value.kept.unflatten(kept)
        seeds = len(values) - len(static.value.draws)
        for place, count in enumerate(static.value.draws, seeds):
            if count:
                changed[place] = values[place] + jnp.array([0, count], values[place].dtype)
        return outputs, changed if layer.update_state_in_inference else {}

    return PureCall(fn, variables, order)


def _cast(layer: JaxLayer, array: Array) -> Array:
    """Cast an input as Keras does before a call."""
    if layer.autocast and jnp.issubdtype(array.dtype, jnp.floating):
        return array.astype(layer.input_dtype)
    return array
