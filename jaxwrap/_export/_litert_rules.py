"""Equations that the converter of LiteRT does not know, by those that it does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer

from jaxwrap._typing import Array


def _gather(
    operand: Array, indices: Array, *, dimension_numbers: Any, slice_sizes: Any, **params: Any
) -> Sequence[Array] | None:
    """Take slices whose sizes are known: a position of one index, or one number along each unknown size."""
    unknown = [axis for axis, size in enumerate(slice_sizes) if not isinstance(size, int)]
    numbers = dimension_numbers
    if not isinstance(indices, Tracer) and indices.size == indices.shape[-1] == 1:
        return _slice(operand, int(np.asarray(indices).item()), numbers, slice_sizes, indices.ndim)
    whole = not set(unknown) & {*numbers.start_index_map, *numbers.collapsed_slice_dims}
    if not unknown or not whole:
        return None
    # Indices gain an axis, and a column, for each axis of an unknown size.
    count, batch = len(unknown), indices.shape[:-1]
    shape = (*(operand.shape[axis] for axis in unknown), *batch, 1)
    columns = [_count(indices.dtype, shape, place) for place in range(count)]
    wide = lax.broadcast_in_dim(indices, (*shape[:-1], indices.shape[-1]), range(count, len(shape)))
    collapsed = tuple(sorted({*numbers.collapsed_slice_dims, *unknown}))
    kept = [
        axis
        for axis in range(operand.ndim)
        if axis not in numbers.collapsed_slice_dims and axis not in numbers.operand_batching_dims
    ]
    inner = [axis for axis in kept if axis not in unknown]
    taken = lax.gather(
        operand,
        lax.concatenate([*columns, wide], len(shape) - 1),
        lax.GatherDimensionNumbers(
            offset_dims=tuple(range(len(shape) - 1, len(shape) - 1 + len(inner))),
            collapsed_slice_dims=collapsed,
            start_index_map=(*unknown, *numbers.start_index_map),
            operand_batching_dims=numbers.operand_batching_dims,
            start_indices_batching_dims=tuple(
                axis + count for axis in numbers.start_indices_batching_dims
            ),
        ),
        [1 if axis in unknown else size for axis, size in enumerate(slice_sizes)],
        mode=params["mode"],
        fill_value=params["fill_value"],
    )
    # Back into the order of the equation: axes of the operand at the offsets, those of the indices between them.
    places = {axis: place for place, axis in enumerate(unknown)}
    places.update({axis: len(shape) - 1 + place for place, axis in enumerate(inner)})
    offsets = dict(zip(numbers.offset_dims, (places[axis] for axis in kept), strict=True))
    rest = iter(range(count, len(shape) - 1))
    order = [offsets[axis] if axis in offsets else next(rest) for axis in range(taken.ndim)]
    return [lax.transpose(taken, order)]


def _slice(
    operand: Array, start: int, numbers: Any, sizes: Sequence[Any], rank: int
) -> Sequence[Array] | None:
    if len(numbers.start_index_map) != 1 or rank != 1:
        return None
    (axis,) = numbers.start_index_map
    if not 0 <= start <= operand.shape[axis] - sizes[axis]:
        return None
    taken = lax.slice_in_dim(operand, start, start + sizes[axis], axis=axis)
    return [lax.squeeze(taken, numbers.collapsed_slice_dims)]


def _argmax(operand: Array, *, axes: tuple[int, ...], index_dtype: Any) -> Sequence[Array]:
    """Return the first place of the maximum, or of NaN."""
    (axis,) = axes
    most = lax.broadcast_in_dim(
        lax.reduce_max(operand, axes),
        operand.shape,
        [place for place in range(operand.ndim) if place != axis],
    )
    found = lax.bitwise_or(lax.eq(operand, most), lax.ne(operand, operand))
    places = _count(jnp.int32, operand.shape, axis)
    last = lax.full_like(places, operand.shape[axis] - 1)
    first = lax.reduce_min(lax.select(found, places, last), axes)
    return [lax.convert_element_type(first, index_dtype)]


def _argmin(operand: Array, **params: Any) -> Sequence[Array] | None:
    if not jnp.issubdtype(operand.dtype, jnp.floating):
        return None
    return _argmax(lax.neg(operand), **params)


def _iota(*, dtype: Any, shape: Sequence[Any], dimension: int, **_: Any) -> Sequence[Array] | None:
    if len(shape) == 1 or all(isinstance(size, int) for size in shape):
        return None
    return [_count(dtype, shape, dimension)]


def _count(dtype: Any, shape: Sequence[Any], axis: int) -> Array:
    """Return the places along an axis. The converter fails for more axes than one, if a size is unknown."""
    return lax.broadcast_in_dim(lax.iota(dtype, shape[axis]), shape, (axis,))


def _xor(left: Array, right: Array) -> Sequence[Array] | None:
    return [lax.ne(left, right)] if left.dtype == bool else None


RULES = {"argmax": _argmax, "argmin": _argmin, "gather": _gather, "iota": _iota, "xor": _xor}
