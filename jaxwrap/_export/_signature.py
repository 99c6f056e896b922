"""The inputs of a model: names, shapes, dtypes, and the structure of its arguments."""

from __future__ import annotations

import inspect
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import keras

from jaxwrap._bridge._stablehlo import Shape
from jaxwrap._dtypes import check_dtype
from jaxwrap._layer import JaxLayer
from jaxwrap._pytree import key_name
from jaxwrap._specs import Spec
from jaxwrap._typing import PyTree


class Input(NamedTuple):
    """One input, with None for an unknown size."""

    name: str
    shape: Shape
    dtype: str


class Signature(NamedTuple):
    """The inputs of a model.

    Attributes:
        inputs: The inputs, in the order of the leaves.
        arguments: The structure of the positional arguments, a tuple.
    """

    inputs: list[Input]
    arguments: Any

    def specs(self) -> list[Any]:
        """Return what a user may pass as `input_signature`."""
        leaves = [keras.InputSpec(dtype, shape) for _, shape, dtype in self.inputs]
        return list(self.arguments.unflatten(leaves))

    def renamed(self, names: Sequence[str]) -> Signature:
        """Return it with other names for the inputs."""
        inputs = [one._replace(name=name) for one, name in zip(self.inputs, names, strict=True)]
        return self._replace(inputs=inputs)


def signature_of(model: Any, chosen: PyTree, batch_size: int | None) -> Signature:
    """Find out what a model takes.

    Args:
        model: A Keras model, or a layer of jaxwrap.
        chosen: One item for each positional argument: a nest of anything with a shape and a dtype. None for the inputs
            that the model was made of.
        batch_size: A size for the first axis of all inputs that have none there. None leaves it unknown.

    Raises:
        TypeError: If `chosen` is not a list, or has another leaf.
        ValueError: If the model does not know its inputs, or a shape has no rank.
    """
    nest = _known(model) if chosen is None else _checked(chosen)
    leaves, treedef = jax.tree_util.tree_flatten_with_path(tuple(nest))
    names = _unique([_name(model, path, leaf) for path, leaf in leaves])
    inputs = []
    for name, (_, leaf) in zip(names, leaves, strict=True):
        shape = tuple(leaf.shape)
        if shape and shape[0] is None:
            shape = (batch_size, *shape[1:])
        dtype = keras.backend.standardize_dtype(leaf.dtype or "float32")
        check_dtype(dtype)
        inputs.append(Input(name, shape, str(jax.dtypes.canonicalize_dtype(dtype))))
    return Signature(inputs, treedef)


def _known(model: Any) -> list[PyTree]:
    if isinstance(model, JaxLayer):
        # A layer that was built by a call holds that call's batch size.
        specs = model._engine.specs or {}
        return [_any_batch(specs[name]) for name in model._engine.inputs.names if name in specs]
    # A sequential model has `inputs` alone, a functional one keeps the nest of them in `input`.
    sequential = isinstance(model, keras.Sequential)
    inputs = model.inputs if sequential else [getattr(model, "input", None)]
    if inputs is None or inputs[0] is None:
        raise ValueError(
            "the model does not know its inputs, as it is neither functional nor sequential. Pass `input_signature`, "
            "such as [keras.InputSpec(shape=(None, 4))]."
        )
    return _any_batch(inputs) if sequential else inputs


def _any_batch(nest: PyTree) -> PyTree:
    def free(leaf: Any) -> Any:
        name = _layer_name(leaf)
        return keras.InputSpec(leaf.dtype, (None, *leaf.shape[1:]) if leaf.shape else (), name=name)

    return jax.tree.map(free, nest, is_leaf=lambda node: isinstance(node, Spec))


def _checked(chosen: PyTree) -> Sequence[Any]:
    if not isinstance(chosen, (list, tuple)):
        raise TypeError(
            "`input_signature` must be a list with one item for each positional argument of the model; received a "
            f"{type(chosen).__name__}. Write [keras.InputSpec(shape=(None, 4))]."
        )
    for leaf in jax.tree_util.tree_leaves(chosen):
        if not hasattr(leaf, "shape") or not hasattr(leaf, "dtype"):
            raise TypeError(
                f"`input_signature` holds {leaf!r}; expected keras.InputSpec or keras.KerasTensor."
            )
        if leaf.shape is None:
            raise ValueError("an InputSpec of `input_signature` has no shape. Pass `shape=`.")
    return chosen


def _name(model: Any, path: tuple[Any, ...], leaf: Any) -> str:
    if name := _layer_name(leaf):
        return name
    first, *below = path
    return "_".join([_parameters(model, first.idx), *map(key_name, below)])


def _layer_name(leaf: Any) -> str | None:
    """Return the name that the user gave an input, or that of its input layer."""
    history = getattr(leaf, "_keras_history", None)
    return history.operation.name if history else getattr(leaf, "name", None)


def _parameters(model: Any, place: int) -> str:
    if isinstance(model, JaxLayer):
        names = model._engine.inputs.names
    else:
        names = list(inspect.signature(model.call).parameters)
    return names[place] if place < len(names) else f"input_{place}"


def _unique(names: list[str]) -> list[str]:
    # Signatures of TensorFlow take identifiers only.
    names = [re.sub(r"\W", "_", name) for name in names]
    return [
        name if names.count(name) == 1 else f"{name}_{names[:place].count(name)}"
        for place, name in enumerate(names)
    ]
