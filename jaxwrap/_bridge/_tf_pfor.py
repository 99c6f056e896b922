"""JAX functions in `tf.vectorized_map`, which replaces each operation of a loop's body by one for all iterations."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import jax
from tensorflow.python.ops.parallel_for import pfor

from jaxwrap._bridge._stablehlo import Artifact
from jaxwrap._typing import Array, FlatFunction, FlatResult, Static

Wrap = Callable[[FlatFunction, int, tuple[str, ...]], Callable[..., FlatResult]]

# A module has no batching rule, so the function that it came from is kept for as long as the graph.
_calls: weakref.WeakKeyDictionary[Any, dict[str, Artifact]] = weakref.WeakKeyDictionary()


def note_call(operation: Any, artifact: Artifact) -> None:
    """Remember which function an operation calls."""
    _calls.setdefault(operation.graph, {})[operation.name] = artifact


def register_converter(wrap: Wrap) -> Wrap:
    """Let TensorFlow vectorize calls of exported functions. Return `wrap`.

    Args:
        wrap: Takes a flat function, its number of arguments and the platforms. Returns a differentiable function of
            tensors.
    """

    def convert(call: Any) -> list[Any]:
        operation = call.op
        artifact = _calls.get(operation.graph, {}).get(operation.name)
        if artifact is None:
            raise pfor.ConversionNotImplementedError("the operation is not a call of jaxwrap.")
        stacked = [tensor.is_stacked for tensor in call.inputs]
        mapped = wrap(_map(artifact, stacked), len(stacked), artifact.exported.platforms)
        results = mapped(*(tensor.t for tensor in call.inputs)).outputs
        return [pfor.wrap(result, any(stacked)) for result in results]

    pfor.RegisterPFor("XlaCallModule")(convert)
    return wrap


def _map(artifact: Artifact, stacked: list[bool]) -> FlatFunction:
    """Return the function of the arguments that the module has, for all iterations."""
    exported = artifact.exported
    kept = exported.module_kept_var_idx
    dropped = [aval for index, aval in enumerate(exported.in_avals) if index not in kept]
    if not all(isinstance(size, int) for aval in dropped for size in aval.shape):
        raise pfor.ConversionNotImplementedError(
            "an argument that is not used has an unknown size."
        )

    axes = [0 if each else None for each in stacked]

    def fill(*arrays: Array) -> list[Array]:
        given = dict(zip(kept, arrays, strict=True))
        arguments = [
            given[index] if index in given else jax.numpy.zeros(aval.shape, aval.dtype)
            for index, aval in enumerate(exported.in_avals)
        ]
        return jax.tree_util.tree_leaves(artifact.jitted(*arguments))

    def flat(*arrays: Array) -> FlatResult:
        function = jax.vmap(fill, axes) if any(stacked) else fill
        return FlatResult(tuple(function(*arrays)), (), Static(None))

    return flat
