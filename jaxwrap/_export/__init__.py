"""Models as files that run without Keras, and mostly without JAX."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import keras
import numpy as np

from jaxwrap._errors import describe, naming
from jaxwrap._export._check import check_file
from jaxwrap._export._child import write_in_child
from jaxwrap._export._formats import FORMATS, Format
from jaxwrap._export._inference import Inference, Ports, trace
from jaxwrap._export._signature import Signature, signature_of
from jaxwrap._export._source import in_inference, source_of_layer, source_of_model
from jaxwrap._export._unsupported import check_supported
from jaxwrap._pytree import is_array
from jaxwrap._typing import PyTree
from jaxwrap._weights._variables import to_host
from jaxwrap.checkpoints._atomic import replacing
from jaxwrap.checkpoints._owner import variables_by_path

__all__ = ["export"]


def export(
    model: keras.Layer,
    path: str | os.PathLike[str],
    format: str = "stablehlo",  # noqa: A002 (the usual word)
    *,
    input_signature: PyTree = None,
    batch_size: int | None = None,
    modules: Sequence[str] = (),
    check: bool = True,
    keep_params: bool = False,
) -> None:
    """Write the inference of a model as a file that runs without Keras, and run and compare it before it is kept.

    Any Keras model will do, on any backend, with wrapped layers or without. On TensorFlow, PyTorch and NumPy, a model
    that is more than one wrapped layer goes to a process with the JAX backend, by a `.keras` file.

    | format | what is written | what runs it |
    | --- | --- | --- |
    | `"stablehlo"` | a file of `jax.export`, for CPU, CUDA and TPU | JAX |
    | `"tf_saved_model"` | a folder | TensorFlow, TensorFlow Serving |
    | `"litert"` | a `.tflite` file of builtin operations | LiteRT |
    | `"onnx"` | an `.onnx` file | ONNX Runtime |

    Inputs have the names that they have in the model, and unknown sizes stay unknown. int8 weights stay int8. A
    SavedModel keeps what calls change in inference. In other formats each call starts from the values of now.

    Args:
        model: A built model, or a built layer of jaxwrap.
        path: The file or folder to write. What is there is replaced once the new one is whole.
        format: One of the table.
        input_signature: A list with one item for each positional argument of the model: a nest of `keras.InputSpec` or
            `keras.KerasTensor`, with None for unknown sizes. By default the inputs that a functional or sequential
            model was made of.
        batch_size: A fixed batch size. By default any will do.
        modules: Names of modules that register classes of the model, for a process with the JAX backend. Modules that
            define registered classes are found without.
        check: Whether to run what was written on two batch sizes, and to compare it with the model, within 1e-4.
        keep_params: For `"stablehlo"`: leave the weights as a first argument, a dict by their names in a checkpoint, so
            that one file serves many checkpoints.

    Raises:
        ImportError: If what writes the format is not installed.
        NotImplementedError: If the format cannot hold an operation of the model. The error names it, and the function
            that calls it.
        TypeError: If `model` is not a Keras layer or cannot be saved for the other process.
        ValueError: If an argument does not fit, or the model has not been built. Or if the file is off: then there is
            no file, and the error names the output.

    Example:
        >>> import flax.linen as nn, jax, keras, numpy as np, tempfile, jaxwrap
        >>> model = keras.Sequential([keras.Input((4,)), jaxwrap.FlaxLayer(nn.Dense(2))])
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     jaxwrap.export(model, f"{folder}/model.stablehlo")
        ...     data = open(f"{folder}/model.stablehlo", "rb").read()
        >>> jax.export.deserialize(bytearray(data)).call(np.ones((3, 4), "float32")).shape
        (3, 2)
    """
    path = pathlib.Path(path)
    if not isinstance(model, keras.Layer):
        raise TypeError(f"export: expected a Keras model or layer; received {model!r}.")
    with naming(describe(model)):
        chosen = _checked(model, path, format, batch_size, modules, keep_params)
        options = {"keep_params": True} if keep_params else {}
        signature = signature_of(model, input_signature, batch_size)
        inference = _trace(model, signature, chosen)
        with replacing(path) as temporary:
            if inference is None:
                ports, leading = write_in_child(
                    model, temporary, format, signature, modules, options
                )
            else:
                check_supported(inference.jaxpr, format, chosen)
                leading = chosen.load_module().write(inference, temporary, **options) or []
                ports = inference.ports
            if check:
                variables = variables_by_path(model)
                weights = [to_host(variables[name]) for name in leading]
                reference = _reference(model, signature, ports)
                check_file(temporary, format, chosen, ports, reference, weights)


def _checked(
    model: keras.Layer,
    path: pathlib.Path,
    format: str,  # noqa: A002
    batch_size: int | None,
    modules: Sequence[str],
    keep_params: bool,
) -> Format:
    if format not in FORMATS:
        raise ValueError(
            f"`format` must be one of {', '.join(map(repr, FORMATS))}; received {format!r}."
        )
    if keep_params and format != "stablehlo":
        raise ValueError(f"`keep_params` is for the format 'stablehlo'; received {format!r}.")
    if isinstance(modules, str) or not all(isinstance(module, str) for module in modules):
        raise ValueError(f"`modules` must be a list of names of modules; received {modules!r}.")
    if batch_size is not None and (not isinstance(batch_size, int) or batch_size < 1):
        raise ValueError(
            f"`batch_size` must be a positive integer or None; received {batch_size!r}."
        )
    if not path.parent.is_dir():
        raise ValueError(f"the folder of `path` does not exist: {path.parent}. Make it first.")
    if not model.built:
        raise ValueError("the model has no weights yet. Call or build it before it is exported.")
    return FORMATS[format]


def _trace(model: keras.Layer, signature: Signature, chosen: Format) -> Inference | None:
    """Trace the model in this process, or return None if that takes another backend."""
    if keras.config.backend() == "jax":
        return trace(source_of_model(model, signature), chosen.keeps_state)
    source = source_of_layer(model, signature)
    return None if source is None else trace(source, chosen.keeps_state)


def _reference(model: Any, signature: Signature, ports: Ports) -> Any:
    """Return the model as a function of arrays. It changes no variable of the model."""

    def call(trainable: list[Any], others: list[Any], inputs: list[Any]) -> list[Any]:
        arguments = signature.arguments.unflatten(inputs)
        outputs, _ = model.stateless_call(trainable, others, *arguments, **in_inference(model))
        leaves = jax.tree_util.tree_leaves(outputs)
        return [leaf for leaf in leaves if is_array(leaf) or hasattr(leaf, "dtype")]

    compiled = jax.jit(call) if keras.config.backend() == "jax" else call

    def reference(inputs: list[np.ndarray]) -> list[np.ndarray]:
        tensors = [keras.ops.convert_to_tensor(array) for array in inputs]
        trainable = [variable.value for variable in model.trainable_variables]
        others = [variable.value for variable in model.non_trainable_variables]
        outputs = compiled(trainable, others, tensors)
        arrays = [np.asarray(keras.ops.convert_to_numpy(output)) for output in outputs]
        # PyTorch and NumPy have wider integers for some dtypes of JAX.
        return [a.astype(port.dtype) for a, port in zip(arrays, ports.outputs, strict=True)]

    return reference
