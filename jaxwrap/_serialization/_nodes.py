"""The nodes that writing and reading share: plain data, and arrays whose values are saved with the weights."""

from __future__ import annotations

import math
import os
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

# JSON holds these as they are. Every other node is a dict with its "kind", or with "class_name" in Keras's form.
PLAIN = (bool, int, float, str, type(None))
# Deeper nests in a file could overflow Python's stack.
MAX_DEPTH = 100


class Weight(NamedTuple):
    """Stands in a config for an array whose value is saved with the weights.

    Attributes:
        shape: The shape.
        dtype: The name of the dtype. For a PRNG key, the dtype of the key data.
        impl: The implementation of a PRNG key, or None.
        place: A number. Weights with the same number are the same array.
        is_numpy: True for a NumPy array, False for a JAX array.
    """

    shape: tuple[int, ...]
    dtype: str
    impl: str | None
    place: int
    is_numpy: bool = False

    def zeros(self) -> Any:
        """Make an array of this shape and dtype."""
        if self.impl is not None:
            return jax.random.wrap_key_data(jnp.zeros(self.shape, self.dtype), impl=self.impl)
        return (np if self.is_numpy else jnp).zeros(self.shape, self.dtype)

    @property
    def size(self) -> int:
        """The size in bytes."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


def check_size(size: int) -> None:
    """Raise ValueError if that many bytes do not fit into memory, before the system kills the process."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if size > memory:
        raise ValueError(
            f"this config asks for arrays of {size:,} bytes; the machine has {memory:,} bytes of memory."
        )
