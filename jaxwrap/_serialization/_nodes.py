"""The nodes that writing and reading share: plain data, and arrays whose values are saved with the weights."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from keras.src.backend.common import global_state

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


class Total:
    """The bytes of all arrays that one file asks for."""

    def __init__(self):
        self._bytes = 0

    @classmethod
    def of_file(cls) -> Total:
        """Return the total of the file that Keras is loading, or a new one."""
        # Keras makes this dict for each file, and drops it with the file.
        shared = global_state.get_global_attribute("shared_objects/id_to_obj_map")
        return cls() if shared is None else shared.setdefault("jaxwrap_total", cls())

    def add(self, size: int) -> None:
        """Count bytes, and raise ValueError if all do not fit into memory, before the system kills the process."""
        self._bytes += size
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        if self._bytes > memory:
            raise ValueError(
                f"this config asks for arrays of {self._bytes:,} bytes; the machine has {memory:,} bytes of memory."
            )


def check_size(arrays: Iterable[Any]) -> None:
    """Add the sizes of arrays, or of what stands for them, to the total of the file that Keras is loading.

    Raises:
        ValueError: If all do not fit into memory.
    """
    Total.of_file().add(sum(math.prod(a.shape) * a.dtype.itemsize for a in arrays))
