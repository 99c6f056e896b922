"""Equations that jax2onnx cannot convert, or not to what ONNX Runtime can run, by those that it can."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax

from jaxwrap._typing import Array


def _max_pool(operand: Array, **params: Any) -> Sequence[Array] | None:
    """Pool two axes at a time, as ONNX Runtime pools at most three."""
    if operand.ndim <= 3:
        return None
    if any(size != 1 for size in params["base_dilation"]):
        return None
    axes = [
        axis
        for axis in range(operand.ndim)
        if (params["window_dimensions"][axis], params["window_strides"][axis]) != (1, 1)
        or params["padding"][axis] != (0, 0)
    ]
    for place in range(0, len(axes), 2):
        operand = _pool_along(operand, axes[place : place + 2], params)
    return [operand]


def _pool_along(operand: Array, axes: list[int], params: dict[str, Any]) -> Array:
    order = [*(axis for axis in range(operand.ndim) if axis not in axes), *axes]
    rows = lax.transpose(operand, order)
    before = rows.shape[: -len(axes)]
    windows = {name: [value[axis] for axis in axes] for name, value in params.items()}
    pooled = lax.reduce_window_max_p.bind(
        lax.reshape(rows, (math.prod(before), *rows.shape[-len(axes) :])),
        window_dimensions=(1, *windows["window_dimensions"]),
        window_strides=(1, *windows["window_strides"]),
        padding=((0, 0), *windows["padding"]),
        base_dilation=(1, *windows["base_dilation"]),
        window_dilation=(1, *windows["window_dilation"]),
    )
    back = [order.index(axis) for axis in range(operand.ndim)]
    return lax.transpose(lax.reshape(pooled, (*before, *pooled.shape[1:])), back)


def _min_pool(operand: Array, **params: Any) -> Sequence[Array] | None:
    if not jnp.issubdtype(operand.dtype, jnp.floating):
        return None
    negative = lax.neg(operand)
    pooled = _max_pool(negative, **params) or [lax.reduce_window_max_p.bind(negative, **params)]
    return [lax.neg(pooled[0])]


def _pad(operand: Array, value: Array, *, padding_config: Any) -> Sequence[Array] | None:
    """Concatenate, since jax2onnx pads known sizes only."""
    if _is_known(operand):
        return None
    for axis, (low, high, inner) in enumerate(padding_config):
        if inner:
            operand = _spread(operand, value, axis, inner)
        blocks = [operand]
        for size, place in ((low, 0), (high, len(blocks))):
            if size > 0:
                shape = (*operand.shape[:axis], size, *operand.shape[axis + 1 :])
                blocks.insert(place and len(blocks), lax.broadcast_in_dim(value, shape, ()))
        operand = lax.concatenate(blocks, axis) if len(blocks) > 1 else operand
        start, stop = max(-low, 0), operand.shape[axis] - max(-high, 0)
        if low < 0 or high < 0:
            operand = lax.slice_in_dim(operand, start, stop, axis=axis)
    return [operand]


def _spread(operand: Array, value: Array, axis: int, inner: int) -> Array:
    """Put `inner` values between any two along an axis."""
    size = operand.shape[axis]
    before, after = operand.shape[:axis], operand.shape[axis + 1 :]
    column = lax.reshape(operand, (*before, size, 1, *after))
    filled = lax.broadcast_in_dim(value, (*before, size, inner, *after), ())
    both = lax.reshape(
        lax.concatenate([column, filled], axis + 1), (*before, size * (inner + 1), *after)
    )
    return lax.slice_in_dim(both, 0, (size - 1) * (inner + 1) + 1, axis=axis)


def _rem(left: Array, right: Array) -> Sequence[Array] | None:
    if _is_known(left):
        return None
    quotient = lax.div(left, right)
    if jnp.issubdtype(left.dtype, jnp.floating):
        quotient = lax.mul(lax.sign(quotient), lax.floor(lax.abs(quotient)))
    return [lax.sub(left, lax.mul(quotient, right))]


def _select(which: Array, *cases: Array) -> Sequence[Array] | None:
    """Select bools by logic, which ONNX Runtime's `Where` does not take."""
    if len(cases) != 2 or cases[0].dtype != bool or which.shape != cases[0].shape:
        return None
    no, yes = cases
    return [
        lax.bitwise_or(lax.bitwise_and(which, yes), lax.bitwise_and(lax.bitwise_not(which), no))
    ]


def _is_known(array: Array) -> bool:
    return all(isinstance(size, int) for size in array.shape)


RULES = {
    "pad": _pad,
    "reduce_window_max": _max_pool,
    "reduce_window_min": _min_pool,
    "rem": _rem,
    "select_n": _select,
}
