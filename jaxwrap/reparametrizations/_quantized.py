"""Weights of 8 and 4 bits. On CPUs, they save memory at rest, not at the peak of a call, and no time."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp

from jaxwrap._serialization import register_serializable
from jaxwrap._typing import Array
from jaxwrap._weights._reparametrization import Reparametrization


@register_serializable("jaxwrap")
@dataclasses.dataclass(frozen=True)
class Int8(Reparametrization):
    """A frozen leaf of 8-bit integers, with a float32 scale for each index of the axes that do not share one.

    Attributes:
        axis: The axes along which numbers share a scale. None for all but the last, which has the outputs in Flax and
            Haiku. For the (out, in) kernels of Equinox pass -1.

    Example:
        >>> import flax.linen as nn, numpy as np, jaxwrap
        >>> int8 = jaxwrap.reparametrizations.Int8()
        >>> layer = jaxwrap.FlaxLayer(nn.Dense(4), rules={".*/kernel": jaxwrap.Rule(reparametrize=int8)}, name="dense")
        >>> _ = layer(np.ones((1, 3), "float32"))
        >>> [(row.path, row.dtype) for row in layer.weight_table()[1:]]
        [('dense/params/kernel/values', 'int8'), ('dense/params/kernel/scale', 'float32')]
    """

    axis: int | Sequence[int] | None = None

    frozen = ("values", "scale")

    def init(self, leaf: Array, key: Array) -> Mapping[str, Array]:
        """Round to the nearest multiple of the scale."""
        values, scale = _scaled(leaf, self.axis, 127)
        return {"values": jnp.round(values).astype(jnp.int8), "scale": scale}

    def apply(self, parts: Mapping[str, Array], shape: tuple[int, ...]) -> Array:
        """Multiply by the scale."""
        return parts["values"].astype(jnp.float32) * parts["scale"]


@register_serializable("jaxwrap")
@dataclasses.dataclass(frozen=True)
class Float8(Reparametrization):
    """A frozen leaf of 8-bit floats (e4m3), with scales as `Int8` has them, where the backend can hold them.

    Attributes:
        axis: See `Int8`.

    Example:
        >>> import jaxwrap
        >>> jaxwrap.Rule(reparametrize=jaxwrap.reparametrizations.Float8()).reparametrize
        Float8(axis=None)
    """

    axis: int | Sequence[int] | None = None

    frozen = ("values", "scale")

    def init(self, leaf: Array, key: Array) -> Mapping[str, Array]:
        """Round to the nearest number of the dtype."""
        values, scale = _scaled(leaf, self.axis, float(jnp.finfo(jnp.float8_e4m3fn).max))
        return {"values": values.astype(jnp.float8_e4m3fn), "scale": scale}

    def apply(self, parts: Mapping[str, Array], shape: tuple[int, ...]) -> Array:
        """Multiply by the scale."""
        return parts["values"].astype(jnp.float32) * parts["scale"]


@register_serializable("jaxwrap")
@dataclasses.dataclass(frozen=True)
class Int4(Reparametrization):
    """A frozen leaf of 4-bit integers, two in a byte, with a float32 scale for each group of numbers.

    A group is `group` numbers with one index of the last axis, next to each other along the others.

    Attributes:
        group: The numbers that share a scale, an even number.

    Raises:
        ValueError: For another `group`.

    Example:
        >>> import flax.linen as nn, numpy as np, jaxwrap
        >>> int4 = jaxwrap.reparametrizations.Int4()
        >>> layer = jaxwrap.FlaxLayer(nn.Dense(8), rules={".*/kernel": jaxwrap.Rule(reparametrize=int4)})
        >>> _ = layer(np.ones((1, 64), "float32"))
        >>> [(row.dtype, row.shape) for row in layer.weight_table()[1:]]
        [('uint8', (32, 8)), ('float32', (2, 8))]
    """

    group: int = 32

    frozen = ("values", "scale")

    def __post_init__(self) -> None:
        if not isinstance(self.group, int) or self.group < 2 or self.group % 2:
            raise ValueError(
                f"Int4: `group` must be an even number from 2; received {self.group!r}."
            )

    def init(self, leaf: Array, key: Array) -> Mapping[str, Array]:
        """Round, and pack the numbers of two neighboring rows into a byte."""
        _check_float(leaf)
        last = leaf.shape[-1] if leaf.ndim else 1
        rows = leaf.astype(jnp.float32).reshape(-1, last)
        group = self._group(len(rows))
        groups = jnp.pad(rows, ((0, -len(rows) % group), (0, 0))).reshape(-1, group, last)
        values, scale = _scaled(groups, 1, 7)
        nibbles = (jnp.round(values).astype(jnp.int8) + 8).astype(jnp.uint8).reshape(-1, 2, last)
        return {"values": nibbles[:, 0] | (nibbles[:, 1] << 4), "scale": scale[:, 0]}

    def apply(self, parts: Mapping[str, Array], shape: tuple[int, ...]) -> Array:
        """Unpack, and multiply by the scales."""
        packed, scale = parts["values"], parts["scale"]
        last = shape[-1] if shape else 1
        count = math.prod(shape) // last if last else 0
        nibbles = jnp.stack([packed & 15, packed >> 4], axis=1).astype(jnp.float32) - 8
        groups = nibbles.reshape(-1, self._group(count), last) * scale[:, None]
        return groups.reshape(-1, last)[:count].reshape(shape)

    def _group(self, rows: int) -> int:
        # A leaf of few rows is one group, and not one that is padded to many.
        return max(2, min(self.group, rows + rows % 2))


def _check_float(leaf: Array) -> None:
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
        raise ValueError(f"only real floats can be quantized; received {leaf.dtype}.")


def _scaled(leaf: Array, axis: Any, most: float) -> tuple[Array, Array]:
    """Return the numbers divided by their scale, which is so that the largest becomes `most`, and the scale."""
    _check_float(leaf)
    axes = tuple(range(leaf.ndim - 1)) if axis is None else axis
    leaf = leaf.astype(jnp.float32)
    largest = jnp.max(jnp.abs(leaf), axis=axes, keepdims=True, initial=0)
    scale = jnp.where(largest > 0, largest / most, 1)
    return leaf / scale, scale
