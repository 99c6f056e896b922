"""Small arrays of one dtype in one vector: each array that crosses to a backend costs microseconds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxwrap._typing import Array, Static

# Up to this many bytes, to pass an array on takes longer than to copy it.
_SMALL = 1 << 16


def is_large(array: Any) -> bool:
    """Whether to copy an array takes longer than to pass it on."""
    # A size is a symbol while TensorFlow's graph does not know it.
    return isinstance(array.size, int) and array.size * array.dtype.itemsize > _SMALL


def pack(arrays: Sequence[Array]) -> tuple[list[Array], list[Array], Static]:
    """Put small arrays together. JAX traces it.

    Returns:
        The vectors, the arrays that stay alone, and as `Static` the places of both among `arrays`: a tuple of places
        for each vector, and a place for each other array.
    """
    small: dict[Any, list[int]] = {}
    for index, array in enumerate(arrays):
        # Typed PRNG keys have no form outside of JAX.
        is_plain = not jnp.issubdtype(array.dtype, jax.dtypes.extended)
        if is_plain and array.size and not is_large(array):
            small.setdefault(array.dtype, []).append(index)
    sizes = [array.size * array.dtype.itemsize for array in arrays]
    split = (group for each in small.values() for group in _vectors(each, sizes))
    groups = tuple(tuple(group) for group in split if len(group) > 1)
    packed = {index for group in groups for index in group}
    alone = tuple(index for index in range(len(arrays)) if index not in packed)
    vectors = [jnp.concatenate([arrays[index].reshape(-1) for index in group]) for group in groups]
    return vectors, [arrays[index] for index in alone], Static((groups, alone))


def _vectors(indices: Sequence[int], sizes: Sequence[int]) -> list[list[int]]:
    """Divide small arrays among vectors, by size. Who keeps one keeps its vector, so that is small too."""
    groups: list[list[int]] = []
    total = 0
    for index in sorted(indices, key=lambda index: sizes[index]):
        total += sizes[index]
        if not groups or total > _SMALL:
            groups.append([])
            total = sizes[index]
        groups[-1].append(index)
    return groups
