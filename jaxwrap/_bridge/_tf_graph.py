"""JAX functions in TensorFlow graphs: exported modules, and the two halves of a differentiated one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import tensorflow as tf
from tensorflow.compiler.tf2xla.python import xla as tfxla

from jaxwrap._bridge._residuals import Linearized
from jaxwrap._bridge._stablehlo import Artifact, Shape, export, export_for
from jaxwrap._bridge._tf_pfor import note_call
from jaxwrap._dtypes import inexact
from jaxwrap._typing import FlatFunction, Tensor

# The newest StableHLO that TensorFlow 2.21 reads is 1.13.7.
STABLEHLO_VERSION = "1.13.0"

Spec = tuple[Shape, str]

# In a graph that a tape watches, one call is two operations:
#
#   arguments ──▶ XlaCallModule(forward) ──▶ outputs, aux
#                        │ residuals                 ┆ tape
#                        ▼                           ▼
#   gradients ◀── XlaCallModule(backward) ◀── cotangents of the float outputs
#
# `forward` is traced once for all unknown sizes. `backward` gets its sizes from the shapes of what it is passed. If
# these do not determine all unknown sizes, there are no halves, and the gradient computes the whole function again.
# So does a second derivative: residuals are results, and nothing says how they depend on the arguments.


class Halves(NamedTuple):
    """A function that returns its residuals too, and its vjp, which takes them. See `Linearized`.

    Attributes:
        forward: The function.
        backward: Takes some of its arguments, the residuals, and a cotangent for each float output.
        arguments: The places of those arguments.
    """

    forward: Artifact
    backward: Artifact
    arguments: Sequence[int]


def export_halves(
    fn: FlatFunction,
    wrt: tuple[int, ...],
    specs: Sequence[Spec],
    platforms: tuple[str, ...] | None,
) -> Halves | None:
    """Export a function and its vjp with respect to the arguments `wrt`.

    Returns:
        The halves, or None if the backward half cannot tell what the unknown sizes are.
    """
    # No argument is state here: nobody overwrites the tensors of a graph.
    linearized = Linearized(fn, wrt, ())
    forward = export(jax.jit(linearized), specs, platforms, STABLEHLO_VERSION)
    exported = forward.exported
    result, residuals, static = jax.tree_util.tree_unflatten(exported.out_tree, exported.out_avals)
    pullback = linearized.pullbacks[static.value]
    arguments = [
        *(exported.in_avals[index] for index in pullback.arguments),
        *residuals,
        *(output for output in result.outputs if inexact(output.dtype)),
    ]
    try:
        backward = export_for(jax.jit(pullback.gradients), arguments, platforms, STABLEHLO_VERSION)
    except ValueError:  # their shapes do not determine the unknown sizes
        return None
    return Halves(forward, backward, pullback.arguments)


def call_module(artifact: Artifact, tensors: Sequence[Tensor]) -> Any:
    """Put a call of an exported function into the graph. Return the pytree that it returns."""
    exported = artifact.exported
    flat: Any = tfxla.call_module(
        # JAX drops arguments that the function does not use.
        [tensors[index] for index in exported.module_kept_var_idx],
        version=exported.calling_convention_version,
        module=artifact.module,
        Tout=[tf.as_dtype(aval.dtype) for aval in exported.out_avals],
        Sout=[
            tf.TensorShape([size if isinstance(size, int) else None for size in aval.shape])
            for aval in exported.out_avals
        ],
        platforms=[platform.upper() for platform in exported.platforms],
        use_shardy_partitioner=True,
    )
    if exported.out_avals:
        note_call(flat[0].op, artifact)
    return jax.tree_util.tree_unflatten(exported.out_tree, flat)


def spec_of(tensor: Tensor) -> Spec:
    """Return the shape and the name of the dtype of a tensor."""
    return tuple(tensor.shape), tensor.dtype.name


def canonical(tensor: Tensor) -> Tensor:
    """Cast a tensor to the dtype that JAX has for it: 32 bits for 64 unless `jax_enable_x64` is set."""
    return tf.cast(tensor, jax.dtypes.canonicalize_dtype(tensor.dtype.as_numpy_dtype).name)
