"""A Keras model as a pure JAX function of its variables and inputs."""

from __future__ import annotations

from typing import Any

import jax
import keras
import numpy as np
from keras.src.models.functional import Functional

from jaxwrap._export._inference import Source
from jaxwrap._export._signature import Signature
from jaxwrap._layer import JaxLayer
from jaxwrap._layer._pure import pure_call
from jaxwrap._pytree import Structure, is_array, key_name, partition
from jaxwrap._typing import Array, PyTree
from jaxwrap._weights._variables import to_host
from jaxwrap.checkpoints._owner import variables_by_path


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
        result: Any = model.stateless_call(values[:count], state, *arguments, **in_inference(model))
        outputs, after = result
        arrays, structure = partition(outputs, is_array)
        results[:] = [structure]
        pairs = enumerate(zip(after, state, strict=True), count)
        # A variable that the model leaves alone comes back as the same tracer.
        return arrays, {place: new for place, (new, old) in pairs if new is not old}

    return _source(model, signature, raw, [*trainable, *others], results)


def in_inference(model: Any) -> dict[str, bool]:
    """Return the train flag as an argument, for a model whose `call` takes one."""
    return {"training": False} if model._call_has_training_arg else {}


def source_of_layer(model: Any, signature: Signature) -> Source | None:
    """Return the inference of a model that is one layer of jaxwrap, on any backend. None for another model."""
    found = _only_call(model, signature)
    if found is None:
        return None
    layer, args, kwargs, inputs, choose = found
    known = set(map(id, inputs))
    call = pure_call(layer, args, kwargs, lambda leaf: id(leaf) in known)
    if call is None:
        return None
    places = [next(n for n, leaf in enumerate(inputs) if leaf is tensor) for tensor in call.order]
    results: list[Any] = []

    def raw(values: list[Array], inputs: list[Array]) -> tuple[list[Array], dict[int, Array]]:
        outputs, changed = call.fn(values, [inputs[place] for place in places])
        arrays, structure = partition(choose(outputs), is_array)
        results[:] = [structure]
        return arrays, changed

    return _source(model, signature, raw, call.variables, results)


class _Leaf:
    """Stands for an input."""


def _only_call(model: Any, signature: Signature) -> Any:
    """Find the only call of a model, if it is that of a layer of jaxwrap.

    Returns:
        The layer, the arguments of its call, those leaves of them that are the inputs of the model, in order, and what
        makes the results of the model from those of the layer. Or None.
    """
    if isinstance(model, keras.Sequential) and model._functional is not None:
        model = model._functional
    if isinstance(model, JaxLayer):
        leaves = [_Leaf() for _ in signature.inputs]
        return model, signature.arguments.unflatten(leaves), {}, leaves, lambda outputs: outputs
    # Of exactly this class: another one may override `call`.
    if type(model) is not Functional:
        return None
    depths = model._nodes_by_depth.values()
    nodes = [node for nodes in depths for node in nodes if not node.is_input]
    if len(nodes) != 1 or not isinstance(nodes[0].operation, JaxLayer):
        return None
    (node,) = nodes
    made = list(map(id, node.output_tensors))
    wanted = jax.tree_util.tree_leaves(model.output)
    inputs = jax.tree_util.tree_leaves(model.input)
    if not all(id(tensor) in made for tensor in wanted):
        return None

    def choose(outputs: PyTree) -> PyTree:
        arrays = keras.tree.flatten(outputs)
        return jax.tree.map(lambda tensor: arrays[made.index(id(tensor))], model.output)

    return node.operation, node.arguments.args, node.arguments.kwargs, inputs, choose


def _source(
    model: Any, signature: Signature, raw: Any, variables: list[keras.Variable], results: list[Any]
) -> Source:
    weights = variables_by_path(model)
    paths = {id(variable): path for path, variable in weights.items()}
    return Source(
        raw,
        [str(paths.get(id(variable), variable.path)) for variable in variables],
        list(map(_value, variables)),
        set(weights),
        list(signature.inputs),
        lambda: output_names(model, results[0]),
        signature.arguments,
        lambda: results[0],
    )


def _value(variable: keras.Variable) -> np.ndarray:
    """Return the value in a dtype that JAX has: seeds have 64 bits on TensorFlow."""
    value = to_host(variable)
    return value.astype(jax.dtypes.canonicalize_dtype(value.dtype), copy=False)


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
