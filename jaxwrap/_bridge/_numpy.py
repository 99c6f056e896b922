"""NumPy: jitted JAX, NumPy arrays out, no gradients."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from jaxwrap._bridge._base import Bridge, BridgedFunction
from jaxwrap._bridge._memory import ALIGNMENT, Kept, host_copies
from jaxwrap._typing import Array, FlatFunction, FlatResult, Role, Tensor

# Up to this many bytes a copy at each call costs less than finding the kept one.
_SMALL = 1 << 16


class NumpyBridge(Bridge):
    """The bridge of Keras's inference-only backend."""

    name = "numpy"

    def __init__(self):
        self._copies = Kept()

    def is_concrete(self, leaf: Any) -> bool:
        return isinstance(leaf, np.ndarray)

    def copies(
        self, arrays: Sequence[Array | np.ndarray], shardings: Sequence[Any]
    ) -> Iterator[Any]:
        return host_copies(arrays)

    def wrap(
        self,
        fn: FlatFunction,
        roles: tuple[Role, ...],
        platforms: tuple[str, ...] | None,
    ) -> BridgedFunction:
        jitted = jax.jit(fn)
        # Only variables. An input is a new array at each call, and nobody would find a copy of it again.
        held = [index for index, role in enumerate(roles) if role.held]

        def call(*tensors: Tensor) -> FlatResult:
            arrays = list(tensors)
            for index in held:
                arrays[index] = self._readable(tensors[index])
            # JAX may read an aliased array after the call returns, while NumPy code is free to overwrite it.
            outputs, aux, static = jax.block_until_ready(jitted(*arrays))
            return FlatResult(_to_numpy(outputs), _to_numpy(aux), static)

        return call

    def _readable(self, array: Tensor) -> Tensor:
        """Return the array of a variable, or an aligned copy that JAX does not copy again.

        Keras puts a new array into a variable at each assignment, so the same array has the same values. It becomes
        read-only, so that nobody writes to it past the copy.
        """
        if not isinstance(array, np.ndarray) or array.nbytes <= _SMALL:
            return array
        copy = self._copies.get(array)
        if copy is None:
            if array.ctypes.data % ALIGNMENT == 0 and array.flags.c_contiguous:
                return array
            array.flags.writeable = False
            copy = jax.numpy.array(array)
            self._copies.put(array, copy)
        return copy


def _to_numpy(arrays: tuple[jax.Array, ...]) -> tuple[Tensor, ...]:
    # A copy, since a view of a JAX array is read-only. Typed PRNG keys have no NumPy form and stay.
    return tuple(
        array if jax.dtypes.issubdtype(array.dtype, jax.dtypes.extended) else np.array(array)
        for array in arrays
    )
