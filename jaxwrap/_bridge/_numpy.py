"""NumPy: jitted JAX, NumPy arrays out, no gradients."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from jaxwrap._bridge._base import Bridge, BridgedFunction
from jaxwrap._bridge._memory import held_runs, host_copies
from jaxwrap._typing import Array, FlatFunction, FlatResult, Role, Tensor


class NumpyBridge(Bridge):
    """The bridge of Keras's inference-only backend."""

    name = "numpy"

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
        # Only variables. An input is a new array at each call, and nobody would find what was made of it again.
        runs = [(run, _Held()) for run in held_runs(roles)]

        def call(*tensors: Tensor) -> FlatResult:
            arrays = list(tensors)
            for run, held in runs:
                arrays[run] = held.arrays(arrays[run])
            outputs, aux, static = jitted(*arrays)
            # JAX may read an aliased array after the call returns, while NumPy code is free to overwrite it.
            for array in (*outputs, *aux):
                array.block_until_ready()
            return FlatResult(_to_numpy(outputs), _to_numpy(aux), static)

        return call


class _Held:
    """JAX arrays of the values of variables, for as long as the variables have these values.

    Keras puts a new array into a variable at each assignment, so the same array has the same values.
    """

    def __init__(self):
        self._last: tuple[list[Tensor], list[Array]] = ([], [])

    def arrays(self, values: list[Tensor]) -> list[Array]:
        """Return a JAX array for each value. The first call with new values converts them."""
        # Read once, since another thread may write.
        before, arrays = self._last
        if len(before) != len(values) or not all(map(operator.is_, values, before)):
            arrays = list(map(_to_jax, values))
            self._last = values, arrays
        return arrays


def _to_jax(value: Tensor) -> Array:
    """Return a JAX array of the same memory, or a copy of an array that is read-only from now on."""
    if not isinstance(value, np.ndarray):
        return value
    array = jax.device_put(value)
    if array.size and array.unsafe_buffer_pointer() != value.ctypes.data:
        # So that nobody writes to it past the copy.
        value.flags.writeable = False
    return array


def _to_numpy(arrays: tuple[jax.Array, ...]) -> tuple[Tensor, ...]:
    # A copy, since a view of a JAX array is read-only. Typed PRNG keys have no NumPy form and stay.
    return tuple(
        [np.array(array) if isinstance(array.dtype, np.dtype) else array for array in arrays]
    )
