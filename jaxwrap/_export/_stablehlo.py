"""StableHLO: an artifact of `jax.export`, which a process with JAX alone reads."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxwrap._bridge._stablehlo import export_for
from jaxwrap._export._formats import Runner
from jaxwrap._export._inference import Inference, Ports
from jaxwrap._pytree import is_array, key_name

PLATFORMS = ("cpu", "cuda", "tpu")
# JAX 0.12 writes 1.18, and JAX 0.10 reads it only after this.
VERSION = "1.9.0"


def write(inference: Inference, path: pathlib.Path, keep_params: bool = False) -> list[str] | None:
    """Write the artifact.

    Args:
        inference: The model.
        path: The file.
        keep_params: Leave the weights as a first argument, a dict by name. By default they are in the file.

    Returns:
        The names of the weights that it takes, in the order of the leaves of that dict.
    """
    values = dict(zip(inference.names, inference.values, strict=True))

    def call(params: dict[str, Any], *arguments: Any) -> Any:
        inputs = jax.tree_util.tree_leaves(arguments)
        outputs = inference.symbolic([params[name] for name in inference.names], *inputs)
        return plain(inference.results.unflatten(outputs))

    def bound(*arguments: Any) -> Any:
        return call(values, *arguments)

    arguments = plain(inference.arguments.unflatten(inference.structs))
    function: Any = bound
    params = None
    if keep_params:
        # Weights that nothing depends on too, so that it takes all that a checkpoint holds.
        params = {
            name: jax.ShapeDtypeStruct(value.shape, value.dtype)
            for name, value in (values | inference.unused).items()
        }
        function, arguments = call, (params, *arguments)
    artifact = export_for(jax.jit(function), arguments, PLATFORMS, VERSION, foreign=True)
    exported = dataclasses.replace(artifact.exported, mlir_module_serialized=artifact.module)
    path.write_bytes(exported.serialize())
    return None if params is None else sorted(params)


def plain(node: Any) -> Any:
    """Make tuples of namedtuples and dicts of other mappings, which another process may not know."""
    if isinstance(node, Mapping):
        return {str(key): plain(value) for key, value in node.items()}
    if isinstance(node, tuple):
        return tuple(map(plain, node))
    if isinstance(node, list):
        return list(map(plain, node))
    if node is None or jax.tree_util.all_leaves([node]):
        return node if is_array(node) or isinstance(node, jax.ShapeDtypeStruct) else None
    paths = jax.tree_util.tree_leaves_with_path(node)
    return {"_".join(map(key_name, path)): leaf for path, leaf in paths if is_array(leaf)}


def load(path: pathlib.Path, ports: Ports) -> Runner:
    """Read an artifact that holds its weights."""
    exported = jax.export.deserialize(bytearray(path.read_bytes()))

    def run(inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
        args, kwargs = exported.in_tree.unflatten(inputs)
        return [
            np.asarray(leaf) for leaf in jax.tree_util.tree_leaves(exported.call(*args, **kwargs))
        ]

    return run
