"""StableHLO: an artifact of `jax.export`, which a process with JAX alone reads."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from jaxwrap._bridge._stablehlo import export_for
from jaxwrap._export._formats import Runner
from jaxwrap._export._inference import Inference, Ports

PLATFORMS = ("cpu", "cuda", "tpu")
# JAX 0.12 writes 1.18, and JAX 0.10 reads it only after this.
VERSION = "1.9.0"


def write(inference: Inference, path: pathlib.Path, keep_params: bool = False) -> None:
    """Write the artifact.

    Args:
        inference: The model.
        path: The file.
        keep_params: Leave the weights as a first argument, a dict by path. By default they are in the file.
    """

    def call(params: dict[str, Any], *arguments: Any) -> Any:
        inputs = jax.tree_util.tree_leaves(arguments)
        outputs = inference.symbolic([params[name] for name in inference.names], *inputs)
        return inference.results.unflatten(outputs)

    values = dict(zip(inference.names, inference.values, strict=True))
    structs = inference.arguments.unflatten(inference.structs)
    if keep_params:
        params = {
            name: jax.ShapeDtypeStruct(value.shape, value.dtype) for name, value in values.items()
        }
        function, arguments = call, (params, *structs)
    else:

        def function(*arguments: Any) -> Any:
            return call(values, *arguments)

        arguments = structs
    artifact = export_for(jax.jit(function), arguments, PLATFORMS, VERSION, foreign=True)
    exported = dataclasses.replace(artifact.exported, mlir_module_serialized=artifact.module)
    path.write_bytes(exported.serialize())


def load(path: pathlib.Path, ports: Ports) -> Runner:
    """Read an artifact that holds its weights."""
    exported = jax.export.deserialize(bytearray(path.read_bytes()))

    def run(inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
        args, kwargs = exported.in_tree.unflatten(inputs)
        return [
            np.asarray(leaf) for leaf in jax.tree_util.tree_leaves(exported.call(*args, **kwargs))
        ]

    return run
