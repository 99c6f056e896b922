"""Memory that JAX and a backend share: aligned copies, and objects made of tensors."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import numpy as np

from jaxwrap._typing import Array, Tensor

# JAX reads foreign memory in place if it begins at a multiple of so many bytes. Otherwise it copies.
ALIGNMENT = 64


class Kept:
    """Objects made of tensors, kept for as long as the tensors live."""

    def __init__(self):
        # By `id`, since NumPy arrays have no hash, and `==` compares tensors number by number.
        self._made: dict[int, tuple[weakref.ref[Any], Any]] = {}

    def get(self, tensor: Tensor) -> Any:
        """Return the object for that very tensor, or None."""
        entry = self._made.get(id(tensor))
        # A new tensor may have the id of one that is gone.
        return entry[1] if entry is not None and entry[0]() is tensor else None

    def put(self, tensor: Tensor, made: Any) -> None:
        """Keep an object for a tensor."""
        key = id(tensor)
        self._made[key] = weakref.ref(tensor, lambda _: self._made.pop(key, None)), made


def host_copies(arrays: Iterable[Array | np.ndarray]) -> Iterator[np.ndarray]:
    """Yield copies on the host that JAX can read in place through any alias. Each is made when asked for."""
    for original in arrays:
        array = np.asarray(original)
        dtype = np.dtype(jax.dtypes.canonicalize_dtype(array.dtype))
        size = array.size * dtype.itemsize
        # NumPy aligns to 16 bytes only, so take a few more and begin at the right one.
        memory = np.empty(size + ALIGNMENT, "uint8")
        start = -memory.ctypes.data % ALIGNMENT
        copy = memory[start : start + size].view(dtype).reshape(array.shape)
        # The copy may be narrower: JAX has 32 bits for 64 unless `jax_enable_x64` is set.
        np.copyto(copy, array, casting="unsafe")
        yield copy
