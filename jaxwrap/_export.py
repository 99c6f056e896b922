"""Models on the JAX backend as TensorFlow SavedModels."""

from __future__ import annotations

import os
from typing import Any

import keras

from jaxwrap._bridge import get_bridge
from jaxwrap._function import PytreeFunction
from jaxwrap._typing import PyTree


def export_saved_model(
    model: keras.Model, path: str | os.PathLike[str], input_signature: PyTree = None
) -> None:
    """Write a Keras model of the JAX backend as a TensorFlow SavedModel, for inference with any batch size.

    The folder holds the endpoint `serve` and the variables, as after `model.export(path, format="tf_saved_model")`.
    That method uses jax2tf, and with JAX 0.12 it writes files that TensorFlow 2.21 cannot read. This function writes
    files that it can. Any Keras model will do, with wrapped layers or without. On TensorFlow, use `model.export`.

    Args:
        model: A built model.
        path: The folder to write.
        input_signature: A list with one item for each positional argument of the model: a nest of `keras.KerasTensor`
            or `keras.InputSpec`, with None for unknown sizes. By default the inputs that a functional or
            sequential model was made of.

    Raises:
        RuntimeError: On a backend other than JAX.
        ValueError: If the model has not been built, or it is a subclassed model and there is no `input_signature`.

    Example:
        >>> import keras, numpy as np, tempfile, jaxwrap
        >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])
        >>> if keras.config.backend() == "jax":
        ...     import tensorflow as tf
        ...     with tempfile.TemporaryDirectory() as folder:
        ...         jaxwrap.export_saved_model(model, folder)
        ...         served = tf.saved_model.load(folder)
        ...         assert served.serve(np.ones((3, 4), "float32")).shape == (3, 2)
    """
    if keras.config.backend() != "jax":
        raise RuntimeError(
            f"`export_saved_model` is for the JAX backend; this is {keras.config.backend()!r}. Use "
            '`model.export(path, format="tf_saved_model")`.'
        )
    if not model.built:
        raise ValueError(
            f"Model {model.name!r} has no weights yet. Call or build it before it is exported."
        )
    # Before the import, since its error names what to install.
    bridge = get_bridge("tensorflow")
    import tensorflow as tf

    signature = _signature(model, input_signature)
    archive: Any = keras.export.ExportArchive()
    archive.track(model)
    trainable = list(archive.trainable_variables)
    others = list(archive.non_trainable_variables)

    def infer(values: PyTree, _: PyTree, state: PyTree) -> tuple[PyTree, PyTree]:
        # Typed with a third result, the losses, which comes only if asked for.
        result: Any = model.stateless_call(values["trainable"], state, *values["inputs"])
        outputs, after = result
        # A variable that the model leaves alone is not written at each call.
        changed = [new if new is not old else None for new, old in zip(after, state, strict=True)]
        return outputs, changed

    function = PytreeFunction(infer, f"model {model.name!r}", bridge=bridge)

    def serve(*inputs: PyTree) -> PyTree:
        outputs, changed = function({"trainable": trainable, "inputs": inputs}, (), others)
        for variable, value in zip(others, changed, strict=True):
            if value is not None:
                variable.assign(value)
        return outputs

    endpoint = tf.function(serve, input_signature=signature, autograph=False)
    # A model that cannot be traced fails here, before a file is written.
    endpoint.get_concrete_function()
    archive.add_endpoint("serve", endpoint)
    archive.write_out(path, verbose=False)


def _signature(model: keras.Model, chosen: PyTree) -> Any:
    import tensorflow as tf

    if chosen is not None:
        return keras.tree.map_structure(
            lambda spec: tf.TensorSpec(spec.shape, spec.dtype or "float32", name=spec.name), chosen
        )
    # A sequential model has `inputs` alone, a functional one keeps the nest of them in `input`.
    sequential = isinstance(model, keras.Sequential)
    inputs = model.inputs if sequential else [getattr(model, "input", None)]
    if inputs is None or inputs[0] is None:
        raise ValueError(
            f"Model {model.name!r} does not know its inputs, as it is neither functional nor sequential. Pass "
            "`input_signature`, such as [keras.InputSpec(shape=(None, 4))]."
        )
    # A sequential model that was built by a call holds that call's batch size.
    return keras.tree.map_structure(
        lambda tensor: tf.TensorSpec((None, *tensor.shape[1:]), tensor.dtype, name=tensor.name),
        inputs,
    )
