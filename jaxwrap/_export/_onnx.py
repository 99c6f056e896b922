"""ONNX: an .onnx file, for ONNX Runtime and what else reads them."""

from __future__ import annotations

import contextlib
import pathlib
import sys
import types
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from jax.extend.core import jaxpr_as_fun

from jaxwrap._export._formats import Runner
from jaxwrap._export._inference import Inference, Ports
from jaxwrap._export._onnx_rules import RULES
from jaxwrap._export._quiet import quiet
from jaxwrap._export._rewriting import rewrite
from jaxwrap._export._unsupported import place_of

_MOST_BYTES = 2**31


def write(inference: Inference, path: pathlib.Path) -> None:
    """Write the file. Its inputs and outputs have the names and the order of the model's.

    Args:
        inference: The model.
        path: The file.

    Raises:
        ImportError: If jax2onnx is not installed.
        NotImplementedError: If it cannot convert an operation of the model.
        ValueError: If the weights are too large for one file, or an input and an output have one name.
    """
    _check(inference)
    # jax2onnx replaces functions of JAX and Flax while it traces. It sees equations alone.
    closed = rewrite(inference.jaxpr, RULES)

    def function(*inputs: Any) -> Any:
        return jaxpr_as_fun(closed)(*inference.values, *inputs)

    names = [port.name for port in inference.ports.inputs]
    with _unchanged(), quiet():
        try:
            import jax2onnx
            import onnx_ir
        except ImportError as error:
            raise ImportError(
                "'onnx' is written by jax2onnx, which is not installed. Install it with "
                "`pip install jaxwrap[onnx]`."
            ) from error
        try:
            model = jax2onnx.to_onnx(
                function, inference.structs, input_names=names, return_mode="ir"
            )
        except Exception as error:
            raise NotImplementedError(_reason(error, inference)) from error
        _name_outputs(model.graph, [port.name for port in inference.ports.outputs])
        onnx_ir.save(model, path)


def load(path: pathlib.Path, ports: Ports) -> Runner:
    """Read the file."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # its errors are exceptions too
    session = onnxruntime.InferenceSession(str(path), options, ["CPUExecutionProvider"])

    def run(inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
        named = {port.name: array for port, array in zip(ports.inputs, inputs, strict=True)}
        return session.run([port.name for port in ports.outputs], named)

    return run


def _check(inference: Inference) -> None:
    size = sum(value.nbytes for value in inference.values)
    if size >= _MOST_BYTES:
        raise ValueError(
            f"the weights have {size / 1e9:.1f} GB, and an ONNX file holds at most 2. Export to 'stablehlo'."
        )
    inputs = {port.name for port in inference.ports.inputs}
    if both := sorted(inputs & {port.name for port in inference.ports.outputs}):
        raise ValueError(
            f"{', '.join(map(repr, both))} names an input and an output, and ONNX has one name for one tensor. Pass "
            "`input_signature` with other names, such as [keras.InputSpec(shape=(None, 4), name='rows')]."
        )


def _name_outputs(graph: Any, names: list[str]) -> None:
    """Give each output a tensor of its own with its name: it may be an input, or another output."""
    import onnx_ir

    inner = [output for node in graph.all_nodes() for output in node.outputs]
    for value in (*inner, *graph.initializers.values()):
        if value.name in names:
            value.name = f"{value.name}_inner"
    for place, name in enumerate(names):
        source = graph.outputs[place]
        node = onnx_ir.node("Identity", [source])
        (output,) = node.outputs
        output.name, output.type, output.shape = name, source.type, source.shape
        graph.append(node)
        graph.outputs[place] = output


@contextlib.contextmanager
def _unchanged() -> Iterator[None]:
    """Put the public functions of JAX back, some of which jax2onnx replaces for good."""
    before = {
        (name, key): value
        for name, module in sys.modules.items()
        if name.startswith("jax.") and not name.startswith("jax._src")
        for key, value in vars(module).items()
        if isinstance(value, types.FunctionType) or callable(value)
    }
    try:
        yield
    finally:
        for (name, key), value in before.items():
            if getattr(sys.modules[name], key, None) is not value:
                setattr(sys.modules[name], key, value)


def _reason(error: Exception, inference: Inference) -> str:
    """Name the operation that was being converted, and the user's function around it."""
    name, trace = None, error.__traceback__
    while trace is not None:
        name = trace.tb_frame.f_locals.get("primitive_name", name)
        trace = trace.tb_next
    said = f"jax2onnx says: {str(error).partition(chr(10))[0] or type(error).__name__}"
    advice = "Export to 'tf_saved_model' or 'stablehlo'."
    if name is None:
        return f"'onnx' cannot hold the model. {said}. {advice}"
    place = place_of(inference.jaxpr, name)
    where = f" in {place}" if place else ""
    return f"`{name}`{where} cannot be converted to 'onnx'. {said}. {advice}"
