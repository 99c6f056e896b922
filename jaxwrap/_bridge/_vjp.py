"""The vjp of a flat function as a flat function, and helpers of the bridges to build one."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jaxwrap._dtypes import inexact
from jaxwrap._typing import Array, FlatFunction, FlatResult, Role, Static


def restrict(
    fn: FlatFunction, wrt: tuple[int, ...], arrays: tuple[Array, ...]
) -> tuple[Any, list[Array]]:
    """Turn `fn` into a function of the arguments `wrt` alone, as `jax.vjp(..., has_aux=True)` takes it.

    It returns `(float outputs, (other outputs, aux, static))`. Outputs that are not floats move to the auxiliary part,
    with None in the place of each float, so that no `float0` appears.

    Returns:
        The function, and its arguments.
    """

    def restricted(*chosen: Array) -> tuple[list[Array], tuple[Any, ...]]:
        merged = list(arrays)
        for index, array in zip(wrt, chosen, strict=True):
            merged[index] = array
        outputs, aux, static = fn(*merged)
        floats = [output for output in outputs if inexact(output.dtype)]
        others = tuple(None if inexact(output.dtype) else output for output in outputs)
        return floats, (others, aux, static)

    return restricted, [arrays[index] for index in wrt]


def vjp(fn: FlatFunction, wrt: tuple[int, ...], arity: int) -> FlatFunction:
    """Return the vjp of a flat function as a flat function, to be bridged, and differentiated, in its turn.

    It takes the `arity` arguments of `fn` and then one cotangent for each float output, and returns one cotangent for
    each argument in `wrt`. Complex cotangents follow the convention of TensorFlow and PyTorch, the conjugate of JAX's.
    """

    def vjp_fn(*arrays: Array) -> FlatResult:
        restricted, primals = restrict(fn, wrt, arrays[:arity])
        _, pullback, _ = jax.vjp(restricted, *primals, has_aux=True)
        gradients = pullback([conjugate(cotangent) for cotangent in arrays[arity:]])
        return FlatResult(tuple(conjugate(gradient) for gradient in gradients), (), Static(None))

    return vjp_fn


def vjp_roles(roles: tuple[Role, ...], cotangents: int) -> tuple[Role, ...]:
    """Return the roles of the arguments of `vjp`'s function. The tape keeps state, which then changes no more."""
    kept = (Role.CONSTANT if role is Role.STATE else role for role in roles)
    return (*kept, *(Role.INPUT,) * cotangents)


def own_outputs(fn: FlatFunction) -> FlatFunction:
    """Copy each argument that `fn` returns as it is.

    JAX returns the same buffer for such an argument. On some backends that is a tensor of the caller, who may
    overwrite it.
    """

    def owning(*arrays: Array) -> FlatResult:
        # By identity: under `jax.jit` an output that is an argument is the same tracer.
        arguments = set(map(id, arrays))
        outputs, aux, static = fn(*arrays)
        outputs, aux = (
            tuple(jnp.copy(array) if id(array) in arguments else array for array in part)
            for part in (outputs, aux)
        )
        return FlatResult(outputs, aux, static)

    return owning


def conjugate(array: Array) -> Array:
    """Conjugate an array if it is complex."""
    return jnp.conj(array) if jnp.issubdtype(array.dtype, jnp.complexfloating) else array
