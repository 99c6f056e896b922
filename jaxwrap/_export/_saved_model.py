"""SavedModel: a folder that TensorFlow, and TensorFlow Serving, run without JAX."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from jaxwrap._bridge import get_bridge
from jaxwrap._bridge._stablehlo import export_for
from jaxwrap._export._formats import Runner
from jaxwrap._export._inference import Inference, Ports

PLATFORMS = ("cpu", "cuda", "tpu")
_DEFAULT = "serving_default"


def write(
    inference: Inference, path: pathlib.Path, platforms: tuple[str, ...] | None = PLATFORMS
) -> None:
    """Write the folder.

    Its endpoint `serve` takes the arguments of the model and returns its results. The signature `serving_default`
    takes the inputs by name, and returns the outputs by name.

    Args:
        inference: The model.
        path: The folder.
        platforms: The platforms that it can run on. None for the present one.
    """
    # Before the import, since its error names what to install.
    get_bridge("tensorflow")
    import tensorflow as tf

    from jaxwrap._bridge._tf_graph import STABLEHLO_VERSION, call_module

    values = [jax.ShapeDtypeStruct(value.shape, value.dtype) for value in inference.values]
    function = jax.jit(inference.symbolic)
    artifact = export_for(function, (values, *inference.structs), platforms, STABLEHLO_VERSION)
    module: Any = tf.Module()
    variable: Any = tf.Variable
    with tf.device("cpu"):
        module.model_variables = [
            variable(value, trainable=bool(np.issubdtype(value.dtype, np.floating)), name=name)
            for name, value in zip(inference.names, inference.values, strict=True)
        ]
    specs = [
        tf.TensorSpec(port.shape, port.dtype, name=port.name) for port in inference.ports.inputs
    ]
    count = len(inference.ports.outputs)

    def compute(inputs: Sequence[Any]) -> list[Any]:
        flat = call_module(artifact, [*map(tf.identity, module.model_variables), *inputs])
        for place, value in zip(inference.updates, flat[count:], strict=True):
            module.model_variables[place].assign(value)
        return flat[:count]

    def serve(*arguments: Any) -> Any:
        return inference.results.unflatten(compute(jax.tree_util.tree_leaves(arguments)))

    def named(**inputs: Any) -> dict[str, Any]:
        outputs = compute([inputs[port.name] for port in inference.ports.inputs])
        names = [port.name for port in inference.ports.outputs]
        return dict(zip(names, outputs, strict=True))

    module.serve = tf.function(
        serve, input_signature=inference.arguments.unflatten(specs), autograph=False
    )
    by_name = {port.name: spec for port, spec in zip(inference.ports.inputs, specs, strict=True)}
    default = tf.function(named, autograph=False).get_concrete_function(**by_name)
    module.serve.get_concrete_function()
    tf.saved_model.save(module, str(path), signatures={_DEFAULT: default, "serve": default})


def load(path: pathlib.Path, ports: Ports) -> Runner:
    """Read the folder."""
    import tensorflow as tf

    # It lives as long as the function, since TensorFlow deletes the variables of what nothing refers to.
    loaded: Any = tf.saved_model.load(str(path))

    def run(inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
        named = {
            port.name: tf.constant(array, port.dtype)
            for port, array in zip(ports.inputs, inputs, strict=True)
        }
        outputs = loaded.signatures[_DEFAULT](**named)
        return [outputs[port.name].numpy() for port in ports.outputs]

    return run
