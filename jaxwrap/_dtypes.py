"""Dtypes, by the names that JAX has for them."""

from __future__ import annotations

import functools
from typing import Any

import jax.numpy as jnp

# Each holds the numbers of those before it.
_KINDS = ("bool", "integer", "float", "complex")


@functools.cache
def inexact(dtype: Any) -> bool:
    """Whether values of `dtype` have gradients."""
    return jnp.issubdtype(dtype, jnp.inexact)


@functools.cache
def kind(dtype: Any) -> str:
    """Return "bool", "integer", "float" or "complex"."""
    kinds = (jnp.integer, jnp.floating, jnp.complexfloating)
    for name, base in zip(_KINDS[1:], kinds, strict=True):
        if jnp.issubdtype(dtype, base):
            return name
    return "bool"


def can_hold(dtype: str, other: Any) -> bool:
    """Whether an array of `dtype` can hold numbers of the dtype `other`, perhaps rounded."""
    try:
        other = jnp.dtype(other)
    except TypeError:
        return False
    # NumPy's kind of bfloat16 and float8 is V, which structures have too.
    known = other.kind in "biufc" or jnp.issubdtype(other, jnp.floating)
    return known and _KINDS.index(kind(other)) <= _KINDS.index(kind(dtype))


def check_dtype(name: str) -> None:
    """Raise TypeError for the name of a dtype that JAX does not have."""
    try:
        dtype = jnp.dtype(name)
        known = jnp.issubdtype(dtype, jnp.number) or dtype == jnp.bool
    except TypeError:
        known = False
    if not known:
        raise TypeError(
            f"JAX has no dtype {name!r}; it has bool, integers, floats (bfloat16 and float8 included) and complex "
            "numbers. Encode such data as numbers first."
        )
