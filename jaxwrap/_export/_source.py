"""A Keras model of the JAX backend as a pure function of its variables and inputs."""

from __future__ import annotations

from typing import Any

import jax
import keras

from jaxwrap._export._inference import Source
from jaxwrap._export._signature import Signature
from jaxwrap._pytree import Structure, is_array, key_name, partition
from jaxwrap._typing import Array, PyTree
from jaxwrap._weights._variables import to_host


def source_of_model(model: Any, signature: Signature) -> Source:
    """Return the inference of a model on the JAX backend."""
    trainable = list(model.trainable_variables)
    others = list(model.non_trainable_variables)
    results: list[Any] = []

    def raw(values: list[Array], inputs: list[Array]) -> tuple[list[Array], dict[int, Array]]:
        count = len(trainable)
        state = values[count:]
        arguments = signature.arguments.unflatten(inputs)
        # Typed with a third result, the losses, which comes only if asked for.
        result: Any = model.stateless_call(values[:count], state, *arguments, training=False)
        outputs, after = result
        arrays, structure = partition(outputs, is_array)
        results[:] = [structure]
        pairs = enumerate(zip(after, state, strict=True), count)
        # A variable that the model leaves alone comes back as the same tracer.
        return arrays, {place: new for place, (new, old) in pairs if new is not old}

    variables = [*trainable, *others]
    return Source(
        raw,
        [variable.path for variable in variables],
        list(map(to_host, variables)),
        list(signature.inputs),
        lambda: output_names(model, results[0]),
        signature.arguments,
        lambda: results[0],
    )


def output_names(model: Any, structure: Structure) -> list[str]:
    """Return the names of outputs: the layers of a functional model that return them, or their paths."""
    paths = structure.key_paths()
    names = getattr(model, "output_names", None)
    flat = all(
        len(path) < 2 and isinstance(key, jax.tree_util.SequenceKey)
        for path in paths
        for key in path
    )
    if names and flat and len(names) == len(paths) == len(set(names)):
        return list(names)
    return [
        "_".join([*(["output"] if _is_place(path) else []), *map(key_name, path or ("0",))])
        for path in paths
    ]


def _is_place(path: tuple[Any, ...]) -> bool:
    """Whether the path begins with a number, or is empty."""
    return not path or isinstance(path[0], jax.tree_util.SequenceKey)


def is_keras_model(model: PyTree) -> bool:
    """Whether an object is what can be exported."""
    return isinstance(model, keras.Layer)
