"""Dtypes, by the names that JAX has for them."""

from __future__ import annotations

import functools
import sys
import warnings
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp

_has_warned = False
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


def warn_if_narrowed(dtypes: Iterable[str]) -> None:
    """Warn, once in a process, of float64 numbers that JAX computes in float32."""
    global _has_warned
    if _has_warned or jax.config.jax_enable_x64:  # pyright: ignore[reportAttributeAccessIssue]
        return
    if any(dtype in ("float64", "complex128") for dtype in dtypes):
        _has_warned = True
        warnings.warn(
            "JAX computes float64 inputs in float32. For float64, call `jax.config.update('jax_enable_x64', True)` "
            "when the program starts. Otherwise pass float32. See 'float64' in the guide.",
            stacklevel=_level_of_caller(),
        )


def _level_of_caller() -> int:
    """The stack level, for a warning of the function that calls this one, of the first frame that is the user's."""
    libraries = ("jaxwrap", "keras", "jax", "tensorflow", "torch")
    frame, level = sys._getframe(1), 1
    while frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] in libraries:
        frame, level = frame.f_back, level + 1
    return level
